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
attribution alone, after loading and one trace of 4 tokens, the median of 3 where one takes less than 5 s; ratios are of
CPU seconds. Memory is the peak over what the loaded model takes. `edges` is the largest difference between the two
graphs' edges, relative to the largest edge, over nodes that both have; `other` how many of the features with a row are
others: at this tool's own settings, and at circuit-tracer's, where it ranks features anew as often (every 4 batches of
256; where that batch failed edges are compared with those at 16, at which circuit-tracer ranks them more often) and
drops no edges of large graphs. `mm` is how many multiply-adds of matrix products a trace makes (counted by PyTorch) in
a CPU second of all of it, as a share of the machine's rate of float32 products (768 x 768 by 768 x 4096, measured in
the same process). A process that runs out of memory or time is a cell that says so. With `--json` rows are added to
what the file has, and the table shows them all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from trace_rows import Row, Settings, machine, make, run, write_json

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_BATCH, SMALL_BATCHES = 256, (16, 64)
COMPARED = (DEFAULT_BATCH, SMALL_BATCHES[0])
"""Batches of circuit-tracer whose edges this tool's are compared with: of the first that finished."""
SAME_LOGITS = 1e-4
"""Largest difference of the two tools' logits, relative to the largest: beyond it they do not run the same model.
Rounding takes 2e-6 of it at 32 tokens and 1.4e-5 at 512."""
ALONE = "12x768-2000-transcoder-256"
"""Longer than circuit-tracer can trace."""
ROWS = (
    "6x256-32-transcoder-2048",
    "6x256-32-transcoder-all",
    "6x256-32-clt-2048",
    "6x256-32-clt-all",
    "6x256-128-transcoder-2048",
    "6x256-128-transcoder-7500",
    "6x256-512-transcoder-2048",
    "12x768-32-transcoder-1024",
    "12x768-32-clt-1024",
    "12x768-128-transcoder-256",
    ALONE,
)


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


class Process(NamedTuple):
    """One tool at one batch."""

    script: str
    batch: int | None  #: None: the tool's default
    keeps: bool  #: whether its edges are compared

    @property
    def own(self) -> bool:
        """Whether it is this tool."""
        return self.script == "run_own_tracer.py"


def processes(row: Row, *, beside: bool) -> dict[str, Process]:
    """What runs for a row; where features are chosen, also this tool ranking them as often as circuit-tracer does."""
    own, peer = "run_own_tracer.py", "run_circuit_tracer.py"
    if not beside:
        return {"own": Process(own, None, False)}
    alike = {} if row.rows is None else {"own alike": Process(own, DEFAULT_BATCH, True)}
    peers = {f"circuit-tracer {n}": Process(peer, n, n in COMPARED) for n in (DEFAULT_BATCH, *SMALL_BATCHES)}
    return {"own": Process(own, None, True), **alike, **peers}


def measure(row: Row, peer: str | None, settings: Settings, scratch: Path) -> dict[str, Any]:
    """All figures of a row."""
    folders = make(row, scratch / "made")
    outs = scratch / "outs"
    shutil.rmtree(outs, ignore_errors=True)
    outs.mkdir()
    figures: dict[str, Any] = {}
    for name, process in processes(row, beside=peer is not None).items():
        interpreter = sys.executable if process.own or peer is None else peer
        out = outs / name if process.keeps else None
        figures[name] = run(row, process.script, interpreter, folders, settings, batch=process.batch, out=out)
        print(f"  {name}: {figures[name]}", file=sys.stderr)
    finished = [outs / f"circuit-tracer {n}" for n in COMPARED if (outs / f"circuit-tracer {n}/edges.npy").is_file()]
    for name in ("own", "own alike"):
        if finished and (outs / name / "edges.npy").is_file():
            figures[f"difference of {name}"] = compare(outs / name, finished[0])
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
    difference, alike = figures.get("difference of own"), figures.get("difference of own alike")
    done = "failed" not in own
    share = own["products"] / own["cpu_seconds"] / own["products_per_second"] if "products" in own else None
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
        " / ".join(f"{one['edges']:.1e}" for one in (difference, alike) if one),
        " / ".join(f"{one['other_rows']:,}" for one in (difference, alike) if one),
        "" if share is None else f"{share:.0%}",
    ]


def _seconds(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    return figures.get("failed") or f"{figures['cpu_seconds']:,.1f} / {figures['wall_seconds']:,.1f}"


def _ratio(peer: dict[str, Any] | None, own: dict[str, Any]) -> str:
    if peer is None or "failed" in own:
        return ""
    if "failed" in peer:  # past the time limit it took at least that; out of memory says nothing of time
        late = peer["failed"].endswith(" s")
        return f"> {int(peer['failed'].split()[1]) / own['cpu_seconds']:.1f}" if late else ""
    return f"{peer['cpu_seconds'] / own['cpu_seconds']:.1f}"


def _megabytes(figures: dict[str, Any] | None) -> str:
    return "" if figures is None or "failed" in figures else f"{figures['peak_bytes'] / 1e6:,.0f}"


def main() -> None:
    """Run rows, or the scaling series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--circuit-tracer", metavar="PYTHON", help="interpreter of an environment with circuit-tracer")
    parser.add_argument("--row", nargs="+", metavar="NAME", default=list(ROWS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=600, help="CPU seconds that a trace may take")
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
        measured[name] = measure(row, peer if name != ALONE else None, settings, scratch)
        if file is not None:
            write_json(file, {"machine": machine(settings), "rows": measured})
    Console(width=200).print(table(measured))


if __name__ == "__main__":
    main()
