"""How exact the engine is: prints, for every kind and family, the figures that its laws are about.

    python benchmarks/exactness.py

Columns: largest difference between the local model's logits and the language model's; largest relative residual of a
    row
(edges and biases against the target's pre-activation); largest difference between the two engines' edges, relative to
the largest edge. Where ../shared/fixtures is, a second table compares with the reference tool's stored results.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from circuits import attribute  # noqa: E402
from graphs import completeness_score, replacement_score  # noqa: E402
from replacement import ReplacementModel  # noqa: E402
from replacement.loading import load_bridge  # noqa: E402
from replacement.neurons import neurons  # noqa: E402
from tests.tiny import FAMILIES, PROMPT, random_set, save_tiny_model  # noqa: E402

KINDS = ("transcoder", "skip_transcoder", "cross_layer_transcoder", "neurons")


def laws(folder: Path, family: str, kind: str, dtype: str) -> tuple[float, float, float]:
    """Logit difference, row residual and engine difference of one kind on one family."""
    bridge, _ = load_bridge(folder, getattr(torch, dtype), "cpu")
    made = neurons(bridge, getattr(torch, dtype)) if kind == "neurons" else random_set(family, kind, "relu", bridge.cfg)
    model = ReplacementModel(bridge, made, name=family)
    logits = float((model.local(PROMPT).logits() - model.logits(PROMPT)).abs().max())
    linear, reference = (attribute(model, PROMPT, engine=engine) for engine in ("linear", "autograd"))
    edges = reference.dense_adjacency()
    return logits, linear.residual, float(np.abs(linear.dense_adjacency() - edges).max() / np.abs(edges).max())


def parity(folder: Path) -> tuple[float, float, float]:
    """Difference from a stored result: adjacency relative to its largest entry, replacement score, completeness
    score."""
    from safetensors.torch import load_file

    record = json.loads((folder / "graph.json").read_text())
    model = ReplacementModel.load(folder / record["model_dir"], dictionaries=folder / record["transcoders_dir"])
    graph = attribute(model, record["prompt"])
    expected = load_file(folder / "graph.safetensors")["adjacency_matrix"].numpy()
    edges = np.abs(graph.dense_adjacency() - expected).max() / np.abs(expected).max()
    replacement = abs(replacement_score(graph) - record["replacement_score"])
    return float(edges), replacement, abs(completeness_score(graph) - record["completeness_score"])


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print one table."""
    made = Table(title=title)
    for name in head:
        made.add_column(name, justify="left" if name in ("family", "kind", "fixture") else "right")
    for row in rows:
        made.add_row(*row)
    Console(width=120).print(made)


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for family in FAMILIES:
            folder = save_tiny_model(family, Path(scratch) / family)
            for kind in KINDS:
                single, double = (laws(folder, family, kind, dtype) for dtype in ("float32", "float64"))
                rows.append(
                    [family, kind, *(f"{value:.1e}" for pair in zip(single, double, strict=True) for value in pair)]
                )
    head = [
        "family",
        "kind",
        *(f"{name} {bits}" for name in ("logits", "rows", "engines") for bits in ("fp32", "fp64")),
    ]
    table("Laws of the local replacement model", head, rows)
    stored = sorted((ROOT.parent / "shared" / "fixtures").glob("*/graph.json"))
    if stored:
        figures = [[path.parent.name, *(f"{value:.1e}" for value in parity(path.parent))] for path in stored]
        table("Against the reference tool", ["fixture", "adjacency", "replacement", "completeness"], figures)


if __name__ == "__main__":
    main()
