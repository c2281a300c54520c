"""How long a cold `circuits` takes, side by side with importing the library it stands on.

    python benchmarks/cold_start.py [--runs 5]

Prints medians of alternating runs in fresh interpreters, and each as a multiple of `import transformer_lens`. Past
imports: the second trace of one interpreter, model and dictionaries loaded anew; the first one imports what it needs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "the capital of the state containing Dallas is"
CIRCUITS = [sys.executable, "-m", "circuits"]
PAST_IMPORTS = "circuits trace (atlas), past imports"
TWICE = """
import shutil, sys, time
from circuits.cli import main
for _ in range(2):
    shutil.rmtree(sys.argv[2])
    started = time.perf_counter()
    if code := main(["trace", sys.argv[1], "-o", sys.argv[2]]):
        raise SystemExit(code)
print(time.perf_counter() - started, file=sys.stderr)
"""


def main() -> None:
    """Run each command several times, in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    out = Path(tempfile.mkdtemp())
    stored = str(out / "graph.safetensors")
    commands = {
        "python -c 'import transformer_lens'": [sys.executable, "-c", "import transformer_lens"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "circuits --help": [*CIRCUITS, "--help"],
        "circuits trace (atlas)": [*CIRCUITS, "trace", PROMPT, "-o", str(out)],
        PAST_IMPORTS: [sys.executable, "-c", TWICE, PROMPT, str(out)],
        "circuits show (stored graph)": [*CIRCUITS, "show", stored],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for _ in range(runs):
            for name, command in commands.items():
                started = perf_counter()
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                seconds[name].append(perf_counter() - started)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr}")
                if name == PAST_IMPORTS:
                    seconds[name][-1] = float(done.stderr.splitlines()[-1])
    finally:
        shutil.rmtree(out)
    base = statistics.median(next(iter(seconds.values())))
    print(f"{'command':<38} {'median s':>9} {'ratio':>7}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<38} {median:9.2f} {median / base:7.2f}")


if __name__ == "__main__":
    main()
