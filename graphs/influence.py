"""How much each node and edge matters to the targets, and the two scores of a whole graph.

Array work only; knows nothing of pruning, files or models. Influence (Ameisen et al. 2025, "Circuit Tracing", on
pruning): with Â = |A| row-normalised and p the targets' weights, I = p (Â + Â² + ...).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from graphs.graph import AttributionGraph

MIN_ROW_SUM = 1e-10
"""Rows whose absolute weights sum to less are divided by this instead, so that they stay near 0."""


def node_influence(graph: AttributionGraph) -> Float[np.ndarray, " n_nodes"]:
    """Return each node's influence on the targets, I = p (Â + Â² + ...), summed over all paths.

    One reverse topological sweep, exact: I_s = sum_t Â[t, s] (I_t + p_t), targets first. Raises InputError where the
    graph has a cycle.
    """
    return _sweep(graph, row_sums(graph))


def edge_influence(graph: AttributionGraph) -> Float[np.ndarray, " n_edges"]:
    """Return the score of each edge, Â[t, s] (I_t + p_t), aligned with `graph.adjacency.data`."""
    sums = row_sums(graph)
    gain = (_sweep(graph, sums) + graph.nodes.probability) / np.maximum(sums, MIN_ROW_SUM)
    return np.abs(graph.adjacency.data.astype(np.float64)) * np.repeat(gain, np.diff(graph.adjacency.indptr))


def cumulative_influence(influence: Float[np.ndarray, " n_nodes"]) -> Float[np.ndarray, " n_nodes"]:
    """Return for each node the share of all influence that it and the nodes ranked above it hold (small is important).

    Nodes of equal influence are ranked in the graph's order.
    """
    order = np.argsort(-influence, kind="stable")
    cumulative = np.empty_like(influence)
    total = influence.sum()
    cumulative[order] = np.cumsum(influence[order]) / total if total > 0 else 1.0
    return cumulative


def replacement_score(graph: AttributionGraph) -> float:
    """Return the share of the inputs' influence that comes from tokens, not errors, I_tok / (I_tok + I_err).

    1.0 where the graph has neither, which is the score of a graph without errors.
    """
    influence = node_influence(graph)
    tokens = float(influence[graph.nodes.is_embedding].sum())
    errors = float(influence[graph.nodes.is_error].sum())
    return tokens / (tokens + errors) if tokens + errors > 0 else 1.0


def completeness_score(graph: AttributionGraph) -> float:
    """Return the share of inputs that no error wrote, sum_t (I_t + p_t)(1 - sum_e Â[t, e]) / sum_t (I_t + p_t).

    e runs over errors. The sum runs over all nodes, as in the reference (circuit-tracer 0.5): those without inputs
    count as explained.
    """
    sums = row_sums(graph)
    weight = _sweep(graph, sums) + graph.nodes.probability
    from_errors = np.abs(graph.adjacency.data) * graph.nodes.is_error[graph.edge_sources]
    error_share = graph.sum_rows(from_errors) / np.maximum(sums, MIN_ROW_SUM)
    total = float(weight.sum())
    return float((weight * (1 - error_share)).sum()) / total if total > 0 else 1.0


def row_sums(graph: AttributionGraph) -> Float[np.ndarray, " n_nodes"]:
    """Return sum_s |A[t, s]| for each node t, in float64."""
    return graph.sum_rows(np.abs(graph.adjacency.data))


def topological_levels(graph: AttributionGraph) -> Int[np.ndarray, " n_nodes"]:
    """Return a level per node such that every edge leads from a lower to a higher one.

    The depth (layer, then place), where that is such a level (every graph that this project makes); else networkx's
    topological generations, which raises InputError where there is a cycle.
    """
    levels = graph.nodes.depth
    if (levels[graph.edge_sources] < levels[graph.edge_targets]).all():
        return levels
    from graphs.structure import generations

    return generations(graph)


def _sweep(graph: AttributionGraph, sums: Float[np.ndarray, " n_nodes"]) -> Float[np.ndarray, " n_nodes"]:
    """Push weight from each level's rows to their sources, highest level first, each row once."""
    levels = topological_levels(graph)
    adjacency, probability = graph.adjacency, graph.nodes.probability
    lengths = np.diff(adjacency.indptr)
    influence = np.zeros(graph.n_nodes)
    for level in np.unique(levels[lengths > 0])[::-1]:
        rows = np.flatnonzero((levels == level) & (lengths > 0))
        gain = (influence[rows] + probability[rows]) / np.maximum(sums[rows], MIN_ROW_SUM)
        block = adjacency[rows]
        weights = np.abs(block.data.astype(np.float64)) * np.repeat(gain, lengths[rows])
        influence += np.bincount(block.indices, weights=weights, minlength=graph.n_nodes)
    return influence
