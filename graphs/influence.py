"""How much each node and edge matters to the targets, and the two scores of a whole graph.

Array work only; knows nothing of pruning, files or models. Influence (Ameisen et al. 2025, "Circuit Tracing", on
pruning): with Â = |A| row-normalised and p the targets' weights, I = p (Â + Â² + ...).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from graphs.graph import AttributionGraph

MIN_ROW_SUM = 1e-10
"""Rows whose absolute weights sum to less are divided by this instead, so that they stay near 0."""


class Flow(NamedTuple):
    """What the scores of a graph have in common, so that a large graph is swept once."""

    row_sums: Float[np.ndarray, " n_nodes"]
    """sum_s |A[t, s]| of each node t."""
    influence: Float[np.ndarray, " n_nodes"]
    """I = p (Â + Â² + ...)."""


def flow(graph: AttributionGraph) -> Flow:
    """Return the sums of each row and each node's influence; raises InputError where the graph has a cycle."""
    sums = graph.sum_rows(graph.adjacency.data, absolute=True)
    return Flow(sums, _sweep(graph, sums))


def node_influence(graph: AttributionGraph) -> Float[np.ndarray, " n_nodes"]:
    """Return each node's influence on the targets, I = p (Â + Â² + ...), summed over all paths.

    One reverse topological sweep, exact: I_s = sum_t Â[t, s] (I_t + p_t), targets first. Raises InputError where the
    graph has a cycle.
    """
    return flow(graph).influence


def edge_influence(graph: AttributionGraph) -> Float[np.ndarray, " n_edges"]:
    """Return the score of each edge, Â[t, s] (I_t + p_t), aligned with `graph.adjacency.data`."""
    sums, influence = flow(graph)
    gain = (influence + graph.nodes.probability) / np.maximum(sums, MIN_ROW_SUM)
    return _pushed(graph.adjacency.data, gain, np.diff(graph.adjacency.indptr))


def cumulative_influence(influence: Float[np.ndarray, " n_nodes"]) -> Float[np.ndarray, " n_nodes"]:
    """Return for each node the share of all influence that it and the nodes ranked above it hold (small is important).

    Nodes of equal influence are ranked in the graph's order.
    """
    order = np.argsort(-influence, kind="stable")
    cumulative = np.empty_like(influence)
    total = influence.sum()
    cumulative[order] = np.cumsum(influence[order]) / total if total > 0 else 1.0
    return cumulative


def replacement_score(graph: AttributionGraph, *, known: Flow | None = None) -> float:
    """Return the share of the inputs' influence that comes from tokens, not errors, I_tok / (I_tok + I_err).

    1.0 where the graph has neither, which is the score of a graph without errors. `known` is `flow(graph)`, where it is
    at hand.
    """
    influence = (known or flow(graph)).influence
    tokens = float(influence[graph.nodes.is_embedding].sum())
    errors = float(influence[graph.nodes.is_error].sum())
    return tokens / (tokens + errors) if tokens + errors > 0 else 1.0


def completeness_score(graph: AttributionGraph, *, known: Flow | None = None) -> float:
    """Return the share of inputs that no error wrote, sum_t (I_t + p_t)(1 - sum_e Â[t, e]) / sum_t (I_t + p_t).

    e runs over errors. The sum runs over all nodes, as in the reference (circuit-tracer 0.5): those without inputs
    count as explained. `known` is `flow(graph)`, where it is at hand.
    """
    sums, influence = known or flow(graph)
    weight = influence + graph.nodes.probability
    from_errors = np.abs(graph.adjacency.data)
    from_errors *= graph.nodes.is_error[graph.edge_sources]
    error_share = graph.sum_rows(from_errors) / np.maximum(sums, MIN_ROW_SUM)
    total = float(weight.sum())
    return float((weight * (1 - error_share)).sum()) / total if total > 0 else 1.0


def topological_levels(graph: AttributionGraph) -> Int[np.ndarray, " n_nodes"]:
    """Return a level per node such that every edge leads from a lower to a higher one.

    The depth (layer, then place), where that is such a level (every graph that this project makes); else networkx's
    topological generations, which raises InputError where there is a cycle.
    """
    levels = graph.nodes.depth.astype(np.int32)
    adjacency = graph.adjacency
    filled = np.flatnonzero(np.diff(adjacency.indptr))
    if (
        not len(filled)
        or (np.maximum.reduceat(levels[adjacency.indices], adjacency.indptr[filled]) < levels[filled]).all()
    ):
        return levels
    from graphs.structure import generations

    return generations(graph)


def _sweep(graph: AttributionGraph, sums: Float[np.ndarray, " n_nodes"]) -> Float[np.ndarray, " n_nodes"]:
    """Push weight from each level's rows to their sources, highest level first, each row once."""
    levels, probability = topological_levels(graph), graph.nodes.probability
    adjacency, influence = graph.adjacency, np.zeros(graph.n_nodes)
    lengths = np.diff(adjacency.indptr)
    filled = np.flatnonzero(lengths)
    for level in np.unique(levels[filled])[::-1]:
        rows = filled[levels[filled] == level]
        gain = (influence[rows] + probability[rows]) / np.maximum(sums[rows], MIN_ROW_SUM)
        weights, sources = _edges_of(adjacency, rows)
        influence += np.bincount(sources, weights=_pushed(weights, gain, lengths[rows]), minlength=graph.n_nodes)
    return influence


def _edges_of(adjacency: csr_array, rows: Int[np.ndarray, " n_rows"]) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and sources of some rows, in a row: views where nothing lies between them, as in full graphs."""
    first, end = int(adjacency.indptr[rows[0]]), int(adjacency.indptr[rows[-1] + 1])
    if end - first != (adjacency.indptr[rows + 1] - adjacency.indptr[rows]).sum():
        block = adjacency[rows]
        return block.data, block.indices
    return adjacency.data[first:end], adjacency.indices[first:end]


def _pushed(
    weights: Float[np.ndarray, " n"], gain: Float[np.ndarray, " n_rows"], lengths: Int[np.ndarray, " n_rows"]
) -> Float[np.ndarray, " n"]:
    """Return |weight| times the gain of its row, in float64."""
    pushed = weights.astype(np.float64)
    np.abs(pushed, out=pushed)
    pushed *= np.repeat(gain, lengths)
    return pushed
