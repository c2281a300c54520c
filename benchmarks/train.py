"""How fast and how well dictionaries train, side by side with SAELens and sparsify on the same activations.

    python benchmarks/train.py --saelens PYTHON --sparsify PYTHON

PYTHON names the interpreter of an environment that has the tool; a tool without one is left out. Every row is a process
of its own with one thread, reads the same file in the same order, and is judged on the same held-out tokens. `of the
floor` is a step's CPU time in units of what seems the least: the encoder's product (fp32) and Adam's pass over the
weights, measured between the row's own steps, as machines change their pace within minutes. Peak memory counts from
after the imports. Learning rates: sparsify's signum at its own default, every Adam at a rate that suits short runs
(see the scripts in `peers/`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).resolve().parent / "peers"
HELD_OUT = 8192


class Row(NamedTuple):
    """One tool at one kind."""

    tool: str
    kind: str  #: as its script calls it
    group: str  #: rows that do the same work


ROWS = (
    Row("saelens", "topk", "SAE, TopK"),
    Row("sparsify", "sae_signum", "SAE, TopK"),
    Row("sparsify", "sae_adam", "SAE, TopK"),
    Row("own", "sae:topk", "SAE, TopK"),
    Row("saelens", "batchtopk", "SAE, BatchTopK"),
    Row("own", "sae:batchtopk", "SAE, BatchTopK"),
    Row("saelens", "jumprelu", "SAE, JumpReLU"),
    Row("own", "sae:jumprelu", "SAE, JumpReLU"),
    Row("sparsify", "skip_transcoder_signum", "skip transcoder, TopK"),
    Row("sparsify", "skip_transcoder_adam", "skip transcoder, TopK"),
    Row("own", "skip_transcoder:topk", "skip transcoder, TopK"),
)


def write_mixture(path: Path, *, tokens: int, width: int, seed: int = 0) -> None:
    """Write rows `x | y` of float32: a sparse mixture and what a sparse map with a linear part makes of it.

    `x = m + sum_i v_i u_i + noise`, `y = sum_i v_i o_i + x M / 2`: about 10 of 1,024 unit directions u_i a token, the
    i-th with probability ~ 1 / (i + 10), strengths v in [0.5, 1.5]; o_i unit directions, M orthogonal, noise 0.02.
    """
    rng, n, active = np.random.default_rng(seed), 1024, 10
    directions, outputs = (_unit(rng.standard_normal((n, width), dtype=np.float32)) for _ in range(2))
    mixed = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    mean = 0.5 * _unit(rng.standard_normal((1, width), dtype=np.float32))
    share = 1 / (np.arange(n) + 10)
    chance = np.cumsum(share / share.sum())
    with path.open("wb") as file:
        for start in range(0, tokens, 4096):
            count = min(4096, tokens - start)
            chosen = np.searchsorted(chance, rng.random((count, active), dtype=np.float32)).clip(0, n - 1)
            strength = rng.random((count, active), dtype=np.float32) + 0.5
            codes = np.zeros((count, n), dtype=np.float32)
            np.put_along_axis(codes, chosen, strength, axis=1)
            x = mean + codes @ directions + 0.02 * rng.standard_normal((count, width), dtype=np.float32)
            file.write(np.stack([x, codes @ outputs + 0.5 * x @ mixed], axis=1).tobytes())


def run(row: Row, interpreter: str, data: Path, features: int, options: argparse.Namespace) -> dict[str, float]:
    """The figures of one row, from a process of its own; raises with the end of its output where it failed."""
    command = [interpreter, str(PEERS / f"run_{row.tool}.py"), row.kind, "--data", str(data)]
    for name in ("width", "k", "batch_tokens", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(
        [*command, "--features", str(features)],
        env={**os.environ, **threads, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{row.tool} {row.kind} with {features} features failed:\n{done.stderr[-1500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _cells(row: Row, figures: dict[str, float], batch_tokens: int) -> list[str]:
    step = batch_tokens / figures["tokens_per_cpu_second"]
    return [
        row.group,
        row.tool if row.tool != "own" else "circuits",
        row.kind,
        f"{figures['tokens_per_cpu_second']:,.0f}",
        f"{figures['tokens_per_second']:,.0f}",
        f"{step * 1e3:,.0f}",
        f"{1e3 * figures['floor_seconds']:,.0f}",
        f"{step / figures['floor_seconds']:.2f}",
        f"{figures['peak_bytes'] / 1e6:,.0f}",
        f"{figures['fvu']:.4f}",
        f"{figures['l0']:.1f}",
    ]


def main() -> None:
    """Run all rows and print one table for every number of features."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--saelens", metavar="PYTHON", help="interpreter of an environment with SAELens 6")
    parser.add_argument("--sparsify", metavar="PYTHON", help="interpreter of an environment with eai-sparsify")
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", metavar="WORD", help="rows whose group or kind has this word")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    interpreters = {"own": sys.executable, "saelens": options.saelens, "sparsify": options.sparsify}
    for tool in ("saelens", "sparsify"):
        if interpreters[tool] is None:
            print(f"{tool}: left out; --{tool} PYTHON names an interpreter that has it")
    chosen = [row for row in ROWS if interpreters[row.tool] and (options.only or "") in f"{row.group} {row.kind}"]
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "activations.bin"
        write_mixture(data, tokens=options.steps * options.batch_tokens + HELD_OUT, width=options.width)
        for features in options.features:
            table = Table(title=f"{features:,} features, {options.steps} steps")
            for name in ("group", "tool", "kind"):
                table.add_column(name)
            for name in ("tokens/CPU-s", "tokens/s", "ms/step", "floor", "of the floor", "peak MB", "FVU", "L0"):
                table.add_column(name, justify="right")
            for row in chosen:
                figures = run(row, interpreters[row.tool], data, features, options)
                table.add_row(*_cells(row, figures, options.batch_tokens))
                results.append({**row._asdict(), "features": features, "steps": options.steps, **figures})
                print(f"{features} {row.tool} {row.kind}: {figures}", file=sys.stderr)
            Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
