"""How fast and in how much memory prompts are traced, side by side with circuit-tracer on the same weights and prompts.

    python benchmarks/trace.py --circuit-tracer PYTHON [--row NAME ...] [--json benchmarks/results/trace.json]
    python benchmarks/trace.py --scaling

PYTHON names the interpreter of an environment that has circuit-tracer 0.5; without it this tool runs alone. A row's
name is LAYERSxWIDTH-TOKENS-KIND-ROWS[-ACTIVE]: `6x256-32-transcoder-all`, `12x768-128-clt-2048`; KIND is `transcoder`
or `clt`, ROWS how many features have a row (`all`, or a number, chosen by influence), ACTIVE how many features are
active a token and layer (40). Any name can be asked for; without `--row` all of ROWS below are run.

Every row is a random Llama model with random ReLU dictionaries in circuit-tracer's format, eight times as wide as the
model. Each tool runs it in processes of its own, with the same threads: circuit-tracer at its command line's batch of
256 (`default`) and at small ones (`best` is the fastest of all), this tool at its defaults. Seconds are those of
attribution alone, after loading and one trace of 4 tokens, the median of 3 where one takes less than 5 s. Memory is the
peak over what the loaded model takes. `edges` is the largest difference between the two graphs' edges, relative to the
largest edge, over nodes that both have; `other` how many of the features with a row are others. `mm` is the share of
the machine's rate of float32 products (768 x 768 by 768 x 4096, measured in the same process) that the least number of
multiply-adds would be (`least_products`). A process that runs out of memory or time is a cell that says so. With
`--json` rows are added to what the file has, and the table shows them all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from random_models import KINDS, make_dictionaries, make_model, prompt_ids
from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).resolve().parent / "peers"
RESULTS = Path(__file__).resolve().parent / "results"
WIDER, ACTIVE = 8, 40
DEFAULT_BATCH, SMALL_BATCHES = 256, (16, 64)
SAME_LOGITS = 1e-5
"""Largest difference of the two tools' logits, relative to the largest: beyond it they do not run the same model."""
OUT_OF_MEMORY = (
    "can't allocate memory",
    "MemoryError",
    "Unable to allocate",
    "out of memory",
    "Cannot allocate memory",
)
ALONE = "12x768-2000-transcoder-256"
"""Longer than circuit-tracer can trace."""
ROWS = (
    *(
        f"{size}-{tokens}-{kind}-{rows}"
        for size in ("6x256", "12x768")
        for tokens in (32, 128, 512)
        for kind in KINDS
        for rows in ("2048", "all")
    ),
    ALONE,
)


class Row(NamedTuple):
    """What is traced."""

    layers: int
    width: int
    tokens: int
    kind: str
    rows: int | None  #: None: all features
    active: int  #: features a token and layer

    @classmethod
    def parse(cls, name: str) -> Row:
        """The row that a name means; exits where it means none."""
        try:
            size, tokens, kind, rows, *active = name.split("-")
            layers, width = (int(number) for number in size.split("x"))
            count = int(active[0]) if active else ACTIVE
            made = cls(layers, width, int(tokens), kind, None if rows == "all" else int(rows), count)
        except (ValueError, IndexError):
            made = None
        if made is None or kind not in KINDS or len(active) > 1:
            raise SystemExit(f"--row {name}: needs LAYERSxWIDTH-TOKENS-KIND-ROWS[-ACTIVE], as 6x256-32-transcoder-all")
        return made


class Settings(NamedTuple):
    """How every process is run."""

    threads: int
    limit: float  #: seconds a process may take
    memory: float  #: GB it may take
    device: str


def make(row: Row, scratch: Path) -> tuple[Path, Path]:
    """Folders of the row's model and dictionaries, made where they are not there yet."""
    model = scratch / f"{row.layers}x{row.width}"
    dictionaries = scratch / f"{model.name}-{row.kind}-{row.active}"
    scratch.mkdir(exist_ok=True)
    if not model.is_dir():
        make_model(model, layers=row.layers, width=row.width)
    if not dictionaries.is_dir():
        for other in scratch.glob("*-*"):  # a cross-layer set takes gigabytes
            shutil.rmtree(other)
        sizes = {"layers": row.layers, "width": row.width, "features": WIDER * row.width, "active": row.active}
        make_dictionaries(dictionaries, kind=row.kind, **sizes)
    return model, dictionaries


def run(
    row: Row, script: str, interpreter: str, folders: tuple[Path, Path], settings: Settings, *,
    batch: int | None = None, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of one process, or `{"failed": why}` where it ran out of memory or time; exits for other failures."""
    command = [interpreter, str(PEERS / script), "--model", str(folders[0]), "--dictionaries", str(folders[1])]
    command += ["--threads", str(settings.threads), "--device", settings.device]
    command += [] if row.rows is None else ["--rows", str(row.rows)]
    command += [] if batch is None else ["--batch", str(batch)]
    command += [] if out is None else ["--out", str(out)]
    command += ["--prompt", *map(str, prompt_ids(row.tokens))]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **{name: str(settings.threads) for name in names}, "HF_HUB_OFFLINE": "1"}
    most = int(settings.memory * 1e9)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=settings.limit,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return _figures(said) or {"failed": f"> {settings.limit:.0f} s"}
    if done.returncode and (done.returncode == -9 or any(words in done.stderr for words in OUT_OF_MEMORY)):
        return _figures(done.stdout) or {"failed": f"> {settings.memory:.0f} GB"}
    if done.returncode:
        raise SystemExit(f"{script} {row} failed:\n{done.stderr[-1500:]}")
    return _figures(done.stdout)


def _figures(output: str) -> dict[str, Any]:
    lines = [line for line in output.splitlines() if line.startswith('{"cpu_seconds"')]
    return json.loads(lines[-1]) if lines else {}


def compare(own: Path, other: Path) -> dict[str, float]:
    """How two graphs on disk differ; exits where they are of different models."""
    logits = np.load(own / "logits.npy"), np.load(other / "logits.npy")
    apart = float(np.abs(logits[0] - logits[1]).max() / np.abs(logits[1]).max())
    if apart > SAME_LOGITS:
        raise SystemExit(f"logits differ by {apart:.1e} of the largest; the tools do not run the same model")
    nodes = [np.load(folder / "nodes.npy") for folder in (own, other)]
    rows = [np.load(folder / "rows.npy") for folder in (own, other)]
    edges = [np.load(folder / "edges.npy", mmap_mode="r") for folder in (own, other)]
    _, *columns = np.intersect1d(*nodes, return_indices=True)
    shared, *at = np.intersect1d(nodes[0][rows[0]], nodes[1][rows[1]], return_indices=True)
    largest = difference = 0.0
    for start in range(0, len(shared), 256):
        mine, theirs = (
            edge[place[start : start + 256]][:, column] for edge, place, column in zip(edges, at, columns, strict=True)
        )
        difference = max(difference, float(np.abs(mine - theirs).max()))
        largest = max(largest, float(np.abs(theirs).max()))
    other_rows = len(np.setdiff1d(nodes[0][rows[0]], nodes[1][rows[1]]))
    return {"logits": apart, "edges": difference / largest, "other_rows": other_rows}


def measure(
    row: Row, folders: tuple[Path, Path], peer: str | None, settings: Settings, scratch: Path
) -> dict[str, Any]:
    """All figures of a row."""
    outs = scratch / "own", scratch / "default"
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)
    own = run(row, "run_own_tracer.py", sys.executable, folders, settings, out=outs[0] if peer else None)
    figures: dict[str, Any] = {"own": own}
    for batch in (DEFAULT_BATCH, *SMALL_BATCHES) if peer else ():
        out = outs[1] if batch == DEFAULT_BATCH else None
        made = run(row, "run_circuit_tracer.py", peer, folders, settings, batch=batch, out=out)
        figures[f"circuit-tracer {batch}"] = made
        print(f"  circuit-tracer {batch}: {made}", file=sys.stderr)
    if all((out / "edges.npy").is_file() for out in outs):
        figures["difference"] = compare(*outs)
    return figures


def table(measured: dict[str, dict[str, Any]]) -> Table:
    """All rows, one line each."""
    made = Table(title="tracing: seconds are CPU / wall, memory is MB over the loaded model")
    made.add_column("row", no_wrap=True)
    heads = ("features with a row", "own s", "default s", "best s (batch)", "faster than default", "than best")
    for name in (*heads, "own MB", "default MB", "best MB", "own process GB", "edges", "other", "mm"):
        made.add_column(name, justify="right")
    for name, figures in measured.items():
        made.add_row(name, *_cells(figures))
    return made


def _cells(figures: dict[str, Any]) -> list[str]:
    own = figures["own"]
    peers = {name.split()[1]: one for name, one in figures.items() if name.startswith("circuit-tracer")}
    default = peers.get(str(DEFAULT_BATCH))
    finished = {batch: one for batch, one in peers.items() if "failed" not in one}
    batch = min(finished, key=lambda batch: finished[batch]["cpu_seconds"], default=None)
    best = default if batch is None else peers[batch]
    difference = figures.get("difference")
    done = "failed" not in own
    share = own["least_products"] / own["cpu_seconds"] / own["products_per_second"] if done else 0.0
    return [
        f"{own['n_features']:,} of {own['n_active']:,}" if done else "",
        _seconds(own),
        _seconds(default),
        _seconds(best) + (f" ({batch})" if batch else ""),
        _ratio(default, own),
        _ratio(best, own),
        _megabytes(own),
        _megabytes(default),
        _megabytes(best),
        f"{own['process_bytes'] / 1e9:.2f}" if done else "",
        f"{difference['edges']:.1e}" if difference else "",
        f"{difference['other_rows']:,}" if difference else "",
        f"{share:.0%}" if done else "",
    ]


def _seconds(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    return figures.get("failed") or f"{figures['cpu_seconds']:,.1f} / {figures['wall_seconds']:,.1f}"


def _ratio(peer: dict[str, Any] | None, own: dict[str, Any]) -> str:
    if peer is None or "failed" in own:
        return ""
    if "failed" in peer:  # a process past the time limit took at least that; one without memory says nothing of time
        late = peer["failed"].endswith(" s")
        return f"> {float(peer['failed'].split()[1]) / own['wall_seconds']:.1f}" if late else ""
    return f"{peer['cpu_seconds'] / own['cpu_seconds']:.1f}"


def _megabytes(figures: dict[str, Any] | None) -> str:
    return "" if figures is None or "failed" in figures else f"{figures['peak_bytes'] / 1e6:,.0f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole, by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def machine(settings: Settings) -> dict[str, Any]:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if settings.device != "cpu" else platform.processor() or platform.machine()
    return {"device": device, "threads": settings.threads, "torch": torch.__version__, "limit_s": settings.limit}


def main() -> None:
    """Run rows, or the scaling series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuit-tracer", metavar="PYTHON", help="interpreter of an environment with circuit-tracer")
    parser.add_argument("--row", nargs="+", metavar="NAME", default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds that a process may take")
    parser.add_argument("--memory", type=float, default=16, help="GB that a process may take")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--scaling", action="store_true", help="this tool alone over tokens, layers, active features")
    options = parser.parse_args()
    settings = Settings(options.threads, options.limit, options.memory, options.device)
    with tempfile.TemporaryDirectory() as scratch:
        if options.scaling:
            from trace_scaling import scale

            scale(Path(scratch), settings, RESULTS)
            return
        side_by_side(options.row, options.circuit_tracer, settings, Path(scratch), options.json)


def side_by_side(names: list[str], peer: str | None, settings: Settings, scratch: Path, file: Path | None) -> None:
    """Run rows, print them, and add each to the file as it comes."""
    rows = {name: Row.parse(name) for name in names}
    known = json.loads(file.read_text()) if file is not None and file.is_file() else {}
    measured: dict[str, dict[str, Any]] = known.get("rows", {})
    if peer is None:
        print("circuit-tracer: left out; --circuit-tracer PYTHON names an interpreter that has it", file=sys.stderr)
    for name, row in rows.items():
        print(name, file=sys.stderr)
        folders = make(row, scratch / "made")
        measured[name] = measure(row, folders, peer if name != ALONE else None, settings, scratch)
        print(f"  own: {measured[name]['own']}", file=sys.stderr)
        if file is not None:
            write_json(file, {"machine": machine(settings), "rows": measured})
    Console(width=200).print(table(measured))


if __name__ == "__main__":
    main()
