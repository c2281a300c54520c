"""Brute force for graphs: random ones, influence by paths and by a matrix inverse, dense pruning, the stored fixtures.

Slow and plain on purpose; knows nothing of how the package does it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from graphs.graph import AttributionGraph, NodeKind, NodeTable

SHARED = Path(__file__).resolve().parents[2] / "shared"
FIXTURES = sorted(path.parent for path in (SHARED / "fixtures").glob("*/graph.safetensors"))


def random_graph(
    seed: int = 0,
    *,
    n_layers: int = 3,
    n_positions: int = 4,
    n_features: int = 12,
    n_targets: int = 2,
    density: float = 0.6,
    dtype: Any = np.float64,
) -> AttributionGraph:
    """Return a random graph in the reference order whose rows add up."""
    rng = np.random.default_rng(seed)
    cells = rng.choice(n_layers * (n_positions - 1) * 50, size=n_features, replace=False)
    features = sorted((int(c % n_layers), 1 + int(c // n_layers % (n_positions - 1)), int(c // 7)) for c in cells)
    layer = [f[0] for f in features] + [i // n_positions for i in range(n_layers * n_positions)]
    layer += [-1] * n_positions + [n_layers] * n_targets
    position = [f[1] for f in features] + [i % n_positions for i in range(n_layers * n_positions)]
    position += [*range(n_positions)] + [n_positions - 1] * n_targets
    counts = (n_features, n_layers * n_positions, n_positions, n_targets)
    kind, n_nodes = np.repeat(np.arange(4), counts), sum(counts)
    layer, position = np.array(layer), np.array(position)
    ids = rng.choice(1000, size=n_positions + n_targets, replace=False)
    tokens = tuple(f" word{i}" for i in range(n_positions))
    allowed = (layer[:, None] > layer[None, :]) & (position[:, None] >= position[None, :])
    allowed &= np.isin(kind, (NodeKind.FEATURE, NodeKind.LOGIT))[:, None]
    allowed &= ~((kind == NodeKind.ERROR) & (position == 0))[None, :]
    weights = (rng.normal(size=(n_nodes, n_nodes)) * allowed * (rng.random((n_nodes, n_nodes)) < density)).astype(dtype)
    rows = np.isin(kind, (NodeKind.FEATURE, NodeKind.LOGIT))
    bias, bos, untraced = (rng.normal(size=n_nodes) * rows for _ in range(3))
    probability = np.zeros(n_nodes)
    probability[-n_targets:] = np.sort(rng.dirichlet(np.ones(n_targets)))[::-1] * 0.95
    return AttributionGraph(
        nodes=NodeTable(
            kind=kind,
            layer=layer,
            position=position,
            feature=np.concatenate([[f[2] for f in features], np.full(counts[1], -1), ids]).astype(np.int64),
            activation=np.where(kind == NodeKind.FEATURE, rng.random(n_nodes) + 0.1, 0.0),
            probability=probability,
            label=("a label",) + ("",) * (n_nodes - n_targets - 1) + tuple(f" answer{i}" for i in range(n_targets)),
        ),
        adjacency=csr_array(weights),
        bias=bias,
        bos=bos,
        untraced=untraced,
        pre_activation=weights.astype(np.float64).sum(1) + bias + bos + untraced,
        prompt="".join(tokens).strip(),
        tokens=tokens,
        token_ids=ids[:n_positions].astype(np.int64),
        n_layers=n_layers,
        model="random/model",
        dictionaries="random dictionaries",
        n_active_features=n_features,
        settings={"engine": "random", "seed": seed},
        residual=0.0,
    )


def normalised(weights: np.ndarray) -> np.ndarray:
    """Return |A| with rows divided by their sums, those below 1e-10 left near 0."""
    sizes = np.abs(weights.astype(np.float64))
    return sizes / np.maximum(sizes.sum(1, keepdims=True), 1e-10)


def influence_by_inverse(weights: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Return p Â (I - Â)^-1."""
    shares = normalised(weights)
    return probability @ shares @ np.linalg.inv(np.eye(len(weights)) - shares)


def influence_by_paths(weights: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Return the sum over all paths from targets down to each node of p times the edges' shares."""
    shares = normalised(weights)
    influence = np.zeros(len(weights))

    def walk(node: int, strength: float) -> None:
        for source in np.flatnonzero(shares[node]).tolist():
            influence[source] += strength * shares[node, source]
            walk(source, strength * shares[node, source])

    for target in np.flatnonzero(probability).tolist():
        walk(target, float(probability[target]))
    return influence


class DenseMasks(NamedTuple):
    nodes: np.ndarray
    edges: np.ndarray


def prune_densely(graph: AttributionGraph, node_threshold: float, edge_threshold: float) -> DenseMasks:
    """Prune by sorting everything and scanning dense matrices to a fixpoint."""
    weights, p, kind = graph.dense_adjacency().astype(np.float64), graph.nodes.probability, graph.nodes.kind
    free = kind >= NodeKind.EMBEDDING
    influence = influence_by_inverse(weights, p)
    nodes = (influence >= sorted_threshold(influence, node_threshold)) | free
    rest = weights * nodes[:, None] * nodes[None, :]
    scores = normalised(rest) * (influence_by_inverse(rest, p) + p)[:, None]
    edges = (scores >= sorted_threshold(scores.ravel(), edge_threshold)) & (rest != 0)
    while True:
        stays = nodes & (free | edges.any(0)) & ((kind != NodeKind.FEATURE) | edges.any(1))
        edges &= stays[:, None] & stays[None, :]
        if (stays == nodes).all():
            return DenseMasks(nodes, edges)
        nodes = stays


def sorted_threshold(scores: np.ndarray, share: float) -> float:
    """Return the score at which the cumulative share of descending positive scores first reaches `share`."""
    descending = np.sort(scores[scores > 0])[::-1]
    if not len(descending):
        return np.inf
    reached = np.searchsorted(np.cumsum(descending) / descending.sum(), share)
    return float(descending[min(reached, len(descending) - 1)])


def dense_edges(graph: AttributionGraph, mask: np.ndarray) -> np.ndarray:
    """Return an edge mask aligned with `adjacency.data` as a dense boolean matrix."""
    rows = np.repeat(np.arange(graph.n_nodes), np.diff(graph.adjacency.indptr))
    dense = np.zeros(graph.adjacency.shape, dtype=bool)
    dense[rows[mask], graph.adjacency.indices[mask]] = True
    return dense


def fixture_graph(folder: Path) -> tuple[AttributionGraph, dict[str, np.ndarray], dict[str, Any]]:
    """Return a reference tool's graph, its tensors and its metadata."""
    tensors, about = load_file(folder / "graph.safetensors"), json.loads((folder / "graph.json").read_text())
    n_layers, n_positions = tensors["error_norms"].shape
    features, targets = tensors["active_features"], tensors["logit_token_ids"]
    counts = (len(features), n_layers * n_positions, n_positions, len(targets))
    n_nodes, before = sum(counts), sum(counts) - len(targets)
    zeros = np.zeros(n_nodes)
    nodes = NodeTable(
        kind=np.repeat(np.arange(4), counts),
        layer=np.concatenate(
            [
                features[:, 0],
                np.repeat(np.arange(n_layers), n_positions),
                np.full(n_positions, -1),
                np.full(counts[3], n_layers),
            ]
        ),
        position=np.concatenate(
            [
                features[:, 1],
                np.tile(np.arange(n_positions), n_layers),
                np.arange(n_positions),
                np.full(counts[3], n_positions - 1),
            ]
        ),
        feature=np.concatenate([features[:, 2], np.full(counts[1], -1), tensors["input_tokens"], targets]),
        activation=np.concatenate([tensors["activation_values"], np.zeros(n_nodes - counts[0])]),
        probability=np.concatenate([np.zeros(before), tensors["logit_probabilities"]]),
        label=("",) * before + tuple(target["token_str"] for target in about["logit_targets"]),
    )
    graph = AttributionGraph(
        nodes=nodes,
        adjacency=csr_array(tensors["adjacency_matrix"]),
        bias=zeros,
        bos=zeros,
        untraced=zeros,
        pre_activation=zeros,
        prompt=about["prompt"],
        tokens=tuple(about["input_token_strings"]),
        token_ids=tensors["input_tokens"],
        n_layers=n_layers,
        model=about["scan"],
        dictionaries=about["variant"],
        n_active_features=len(features),
    )
    return graph, tensors, about
