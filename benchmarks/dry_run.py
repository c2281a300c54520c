"""What `--dry-run` expects beside what a trace really takes.

    python benchmarks/dry_run.py [--size LAYERS,WIDTH,TOKENS,ROWS ...]

Random Llama models with random transcoders, about 40 active features a token and layer. Each line is two fresh
processes of `circuits`, one thread each, one after the other: seconds are CPU seconds after loading (what else the
machine does is no part of them), memory is the largest of the process. A ratio within 0.5 to 2 is what `--dry-run`
promises.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from random_models import make_dictionaries, make_model, prompt_text
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("4,128,16,all", "6,256,32,all", "6,256,64,500", "6,256,128,7500", "12,768,32,1000")
FEATURES, ACTIVE = 2048, 40
RUN = """
import json, resource, sys, time
from circuits import attribute, preflight
from replacement import ReplacementModel
what, model, dictionaries, prompt, rows = sys.argv[1:]
preflight.perf_counter = time.process_time
model = ReplacementModel.load(model, dictionaries=dictionaries)
limit = None if rows == "all" else int(rows)
started = time.process_time()
if what == "expected":
    said = preflight.preflight(model, prompt, max_features=limit)
    figures = {"tracing": said.tracing_seconds, "seconds": said.seconds, "edges": said.edges, "bytes": said.peak_bytes}
    figures["cost"] = time.process_time() - started
else:
    graph = attribute(model, prompt, max_features=limit)
    tracing = time.process_time() - started
    preflight._finish(graph)
    figures = {"tracing": tracing, "seconds": time.process_time() - started, "edges": graph.n_edges}
    figures["bytes"] = preflight._largest_memory()
print(json.dumps(figures))
"""


def make(folder: Path, layers: int, width: int) -> None:
    """Save a random model with its transcoders."""
    make_model(folder / "model", layers=layers, width=width)
    sizes = {"layers": layers, "width": width, "features": FEATURES, "active": ACTIVE}
    make_dictionaries(folder / "dictionaries", kind="transcoder", **sizes)


def figures(what: str, folder: Path, tokens: int, rows: str) -> dict[str, float]:
    """What a fresh process says, expected or real."""
    paths = [str(folder / "model"), str(folder / "dictionaries")]
    command = [sys.executable, "-c", RUN, what, *paths, prompt_text(tokens), rows]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="LAYERS,WIDTH,TOKENS,ROWS")
    sizes = parser.parse_args().size or SIZES
    table = Table(title="expected / real (ratio)")
    for name in ("layers", "width", "tokens", "rows", "tracing s", "all s", "edges, 1,000", "memory GB", "dry run s"):
        table.add_column(name, justify="right")
    for size in sizes:
        layers, width, tokens, rows = size.split(",")
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), int(layers), int(width))
            expected, real = (figures(what, Path(scratch), int(tokens), rows) for what in ("expected", "real"))
        cells = []
        for name, unit, digits in (("tracing", 1, 1), ("seconds", 1, 1), ("edges", 1e3, 0), ("bytes", 1e9, 2)):
            a, b = expected[name] / unit, real[name] / unit
            cells.append(f"{a:,.{digits}f} / {b:,.{digits}f} ({a / b:.2f})")
        table.add_row(layers, width, tokens, rows, *cells, f"{expected['cost']:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
