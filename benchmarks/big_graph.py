"""How long a big graph takes to prune, score and write, and how much memory: 7,500 targets, 500,000 sources.

    python benchmarks/big_graph.py [--targets 7500] [--sources 500000] [--draws 3000] [--layers 12] [--positions 2000]

Prints, on one thread, each step's seconds and its peak of memory over what the graph itself takes. The graph is random:
features, errors and embeddings by layer and position; a row's `--draws` sources (doubles count once) come from the
layers below and the positions before it, half of them from the features that have rows. Sources' strengths and edges
are log-normal with the spreads below, so that influence is about as concentrated as in graphs of real prompts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when numpy is loaded
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402
from scipy.sparse import csr_array  # noqa: E402

from graphs.dot import to_dot  # noqa: E402
from graphs.errors import InputError  # noqa: E402
from graphs.graph import AttributionGraph, NodeTable  # noqa: E402
from graphs.influence import completeness_score, replacement_score  # noqa: E402
from graphs.neuronpedia import write_neuronpedia  # noqa: E402
from graphs.pruning import prune  # noqa: E402

STRENGTH, SPREAD = 2.0, 1.0
"""Standard deviations of the logarithms of a source's strength, and of an edge given its source."""
MIB = 2**20


class Shape(NamedTuple):
    """How large the random graph is."""

    targets: int
    sources: int
    draws: int
    layers: int
    positions: int


def big_graph(shape: Shape, *, n_logits: int = 10, seed: int = 0) -> AttributionGraph:
    """Return a random graph in the reference order whose rows add up."""
    rng = np.random.default_rng(seed)
    n_errors = shape.layers * shape.positions
    n_features = shape.sources - n_errors - shape.positions
    cell = np.sort(rng.integers(0, n_errors, n_features))  # layer-major, as the reference order has it
    every, last = np.arange(shape.positions), np.full(n_logits, shape.positions - 1)
    blocks = np.repeat(np.arange(shape.layers), shape.positions)
    layer = np.concatenate([cell // shape.positions, blocks, np.full(shape.positions, -1), last * 0 + shape.layers])
    position = np.concatenate([cell % shape.positions, np.tile(every, shape.layers), every, last])
    kind = np.repeat(np.arange(4), [n_features, n_errors, shape.positions, n_logits])
    n_nodes = len(kind)
    strength = np.exp(rng.normal(size=n_nodes) * STRENGTH).astype(np.float32)
    n_rows = shape.targets - n_logits
    traced = np.sort(np.argpartition(strength[:n_features], n_features - n_rows)[n_features - n_rows :])
    rows = np.concatenate([traced, np.arange(n_nodes - n_logits, n_nodes)])
    cells = (cell[traced], traced), (cell, np.arange(n_features))
    sources = [_draw(rng, int(layer[row]), int(position[row]), cells, shape) for row in rows.tolist()]
    lengths = np.zeros(n_nodes, dtype=np.int64)
    lengths[rows] = [len(found) for found in sources]
    indices = np.concatenate(sources).astype(np.int32)
    weights = rng.normal(size=len(indices)).astype(np.float32)
    weights = np.copysign(np.exp(weights * SPREAD), rng.random(len(indices), dtype=np.float32) - 0.5)
    weights *= strength[indices]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    adjacency = csr_array((weights, indices, indptr), shape=(n_nodes, n_nodes))
    probability = np.zeros(n_nodes)
    probability[-n_logits:] = 0.95 * 0.5 ** np.arange(1, n_logits + 1)
    zeros, feature = np.zeros(n_nodes), np.arange(n_nodes) % 16384
    return AttributionGraph(
        nodes=NodeTable(
            kind=kind,
            layer=layer,
            position=position,
            feature=np.where(kind == 1, -1, feature),
            activation=np.where(kind == 0, strength, 0.0),
            probability=probability,
            label=("",) * n_nodes,
        ),
        adjacency=adjacency,
        bias=zeros,
        bos=zeros,
        untraced=zeros,
        pre_activation=adjacency.sum(1, dtype=np.float64),
        prompt="a long prompt",
        tokens=tuple(f" word{i}" for i in range(shape.positions)),
        token_ids=every,
        n_layers=shape.layers,
        model="random",
        dictionaries="random",
        n_active_features=n_features,
        residual=0.0,
    )


def _draw(
    rng: np.random.Generator, layer: int, position: int, pools: tuple[tuple[np.ndarray, np.ndarray], ...], shape: Shape
) -> np.ndarray:
    """Return the sources of a row at a layer and position, sorted; a pool is its features' cells, ascending, and them.

    An equal share of the draws goes to each pool, and a sixteenth of them all to errors and to embeddings each.
    """
    starts, n_few = np.arange(layer) * shape.positions, max(shape.draws // 16, 1)
    n_errors = shape.layers * shape.positions
    first_error = shape.sources - n_errors - shape.positions
    drawn = [first_error + n_errors + rng.integers(0, position + 1, n_few)]
    if layer:
        cells = rng.integers(0, layer, n_few) * shape.positions + rng.integers(0, position + 1, n_few)
        drawn.append(first_error + cells)
    for cells, members in pools:
        low, high = np.searchsorted(cells, starts), np.searchsorted(cells, starts + position, side="right")
        ends = np.cumsum(high - low)
        if layer and ends[-1]:
            draws = rng.integers(0, ends[-1], (shape.draws - 2 * n_few) // len(pools))
            block = np.searchsorted(ends, draws, side="right")
            drawn.append(members[high[block] - ends[block] + draws])
    return np.unique(np.concatenate(drawn))


class Cost(NamedTuple):
    """What one step took."""

    seconds: float
    cpu_seconds: float
    peak: int
    """Largest resident size during the step, less that before the first step, in bytes."""


def measured(step: Callable[[], Any], base: int) -> tuple[Any, Cost]:
    """Run a step and return its result and its cost; `base` is the resident size that is not counted."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    wall, cpu = perf_counter(), process_time()
    result = step()
    return result, Cost(perf_counter() - wall, process_time() - cpu, resident("VmHWM") - base)


def write_json(graph: AttributionGraph, path: Path) -> None:
    """Write the viewers' JSON; beyond their limit of 100 MB, say so."""
    try:
        write_neuronpedia(graph, path)
    except InputError as problem:
        print(problem)


def resident(field: str = "VmRSS") -> int:
    """Return a size of this process that Linux keeps, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    """Build the graph, run each step, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in Shape(targets=7500, sources=500_000, draws=3000, layers=12, positions=2000)._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    shape = Shape(**vars(parser.parse_args()))
    before = resident()
    graph = big_graph(shape)
    base = resident()
    size = f"{graph.n_edges:,} edges, {graph.n_edges / shape.targets:,.0f} a target; {(base - before) / MIB:.0f} MiB"
    print(f"{shape.targets:,} targets, {shape.sources:,} sources, {size}")
    costs: dict[str, Cost] = {}
    pruned, costs["prune"] = measured(lambda: prune(graph), base)
    _, costs["replacement score"] = measured(lambda: replacement_score(graph), base)
    _, costs["completeness score"] = measured(lambda: completeness_score(graph), base)
    with tempfile.TemporaryDirectory() as folder:
        _, costs["native file, whole graph"] = measured(lambda: graph.save(Path(folder, "whole.graph")), base)
        _, costs["native file, pruned"] = measured(lambda: pruned.save(Path(folder, "small.graph")), base)
        _, costs["Neuronpedia JSON, pruned"] = measured(lambda: write_json(pruned, Path(folder, "a.json")), base)
        _, costs["DOT, pruned"] = measured(lambda: to_dot(pruned).source, base)
        sizes = {path.name: path.stat().st_size / MIB for path in Path(folder).iterdir()}
    print(f"pruned: {pruned.n_nodes:,} nodes, {pruned.n_edges:,} edges; files in MiB:", end="")
    print("".join(f" {name} {size:.1f}" for name, size in sorted(sizes.items())))
    print(f"{'step':<28} {'seconds':>8} {'CPU':>8} {'peak MiB':>9}")
    for name, cost in costs.items():
        print(f"{name:<28} {cost.seconds:8.2f} {cost.cpu_seconds:8.2f} {cost.peak / MIB:9.0f}")
    total = Cost(*(sum(c[i] for c in costs.values()) for i in (0, 1)), max(cost.peak for cost in costs.values()))
    print(f"{'in all':<28} {total.seconds:8.2f} {total.cpu_seconds:8.2f} {total.peak / MIB:9.0f}")


if __name__ == "__main__":
    main()
