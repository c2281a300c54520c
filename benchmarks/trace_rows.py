"""Rows of the tracing benchmark: what a name means, the folders it needs, one process that runs it.

Knows no tool but by the name of its script in `peers/`, and makes no table.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from random_models import KINDS, make_dictionaries, make_model, prompt_ids

PEERS = Path(__file__).resolve().parent / "peers"
WIDER, ACTIVE = 8, 40
OUT_OF_MEMORY = (
    "can't allocate memory",
    "MemoryError",
    "Unable to allocate",
    "out of memory",
    "Cannot allocate memory",
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
    limit: int  #: CPU seconds a trace may take
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
    command += ["--threads", str(settings.threads), "--device", settings.device, "--limit", str(settings.limit)]
    command += [] if row.rows is None else ["--rows", str(row.rows)]
    command += [] if batch is None else ["--batch", str(batch)]
    command += [] if out is None else ["--out", str(out)]
    command += ["--prompt", *map(str, prompt_ids(row.tokens))]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **{name: str(settings.threads) for name in names}, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=lambda: _bound(settings))
    printed = [line for line in done.stdout.splitlines() if line.startswith('{"cpu_seconds"')]
    if printed:  # also where it failed later, while it wrote edges
        return json.loads(printed[-1])
    if done.returncode == -signal.SIGXCPU:
        return {"failed": f"> {settings.limit} s"}
    if done.returncode == -signal.SIGKILL or any(words in done.stderr for words in OUT_OF_MEMORY):
        return {"failed": f"> {settings.memory:g} GB"}
    raise SystemExit(f"{script} {row} failed:\n{done.stderr[-1500:]}")


def _bound(settings: Settings) -> None:
    """Limit the memory of this process that is its own."""
    if settings.device == "cpu":  # a GPU's driver takes address space at will
        most = int(settings.memory * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


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
