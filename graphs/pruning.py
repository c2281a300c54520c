"""Cut a graph down to the nodes and edges that carry most of the influence.

The field's definition (circuit-tracer; Ameisen et al. 2025): two thresholds on cumulative influence, then a fixpoint.
Thresholds are found by selection, structure by networkx. Knows nothing of files, viewers or models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from graphs.errors import InputError
from graphs.graph import AttributionGraph
from graphs.influence import (
    completeness_score,
    cumulative_influence,
    edge_influence,
    flow,
    node_influence,
    replacement_score,
)

SMALL = 4096
"""Candidates below which the threshold search simply sorts."""


class PruneMasks(NamedTuple):
    """What a pruning keeps of a graph."""

    nodes: Bool[np.ndarray, " n_nodes"]
    edges: Bool[np.ndarray, " n_edges"]
    """Aligned with `graph.adjacency.data`."""
    influence: Float[np.ndarray, " n_nodes"]
    """Each node's influence on the targets in the graph before pruning."""


def prune(graph: AttributionGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
    """Keep the smallest sets of nodes and edges that hold the given shares of influence, and what has a way in and out.

    Nodes are ranked by I = p (Â + Â² + ...); the edges between kept nodes by Â'[t, s] (I'_t + p_t) on the renormalised
    rest; then features without inputs and features and errors without outputs are dropped until nothing changes.
    Tokens and targets always stay. (circuit-tracer `prune_graph`; Ameisen et al. 2025.)

    `node_threshold` and `edge_threshold` are shares in [0, 1]. The result keeps each node's sums and the full graph's
    `residual`; its `influence` is the cumulative share at each node's rank; `settings["pruning"]` holds the thresholds,
    the sizes before, and the scores of the graph before pruning. The law of rows is a law of the full graph: a
    pruned row's edges no longer sum to its pre-activation. Raises InputError for a threshold outside [0, 1] or a cycle.
    """
    check_threshold("node_threshold", node_threshold)
    check_threshold("edge_threshold", edge_threshold)
    known = flow(graph)
    masks = _masks(graph, known.influence, node_threshold, edge_threshold)
    record = {
        "node_threshold": float(node_threshold),
        "edge_threshold": float(edge_threshold),
        "n_nodes": graph.n_nodes,
        "n_edges": graph.n_edges,
        "replacement_score": replacement_score(graph, known=known),
        "completeness_score": completeness_score(graph, known=known),
    }
    return replace(
        graph.subgraph(masks.nodes, masks.edges),
        influence=cumulative_influence(masks.influence)[masks.nodes],
        settings={**graph.settings, "pruning": record},
    )


def prune_masks(graph: AttributionGraph, *, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneMasks:
    """Return which nodes and edges `prune` keeps; arguments and errors are those of `prune`."""
    check_threshold("node_threshold", node_threshold)
    check_threshold("edge_threshold", edge_threshold)
    return _masks(graph, node_influence(graph), node_threshold, edge_threshold)


def _masks(
    graph: AttributionGraph, influence: Float[np.ndarray, " n_nodes"], node_threshold: float, edge_threshold: float
) -> PruneMasks:
    always = graph.nodes.is_embedding | graph.nodes.is_logit
    kept_nodes = (influence >= selection_threshold(influence, node_threshold)) | always

    kept_edges = np.repeat(kept_nodes, np.diff(graph.adjacency.indptr))
    kept_edges &= kept_nodes[graph.edge_sources]
    scores = edge_influence(graph.subgraph(kept_nodes))  # in the order of kept_edges: both are canonical CSR
    kept_edges[kept_edges] = scores >= selection_threshold(scores, edge_threshold)

    kept = np.flatnonzero(kept_edges)
    sources, targets = graph.edge_sources[kept], np.searchsorted(graph.adjacency.indptr, kept, side="right") - 1
    kept_nodes = connected(graph, kept_nodes, sources, targets)
    kept_edges[kept] = kept_nodes[sources] & kept_nodes[targets]
    return PruneMasks(kept_nodes, kept_edges, influence)


def selection_threshold(scores: Float[np.ndarray, " n"], share: float) -> float:
    """Return the score at which the cumulative sum of descending scores first reaches `share` of the total.

    Keeping every score >= that value keeps the smallest set that holds the share (and ties with its last member).
    Found by selection in linear time, without sorting all scores. `share=1` gives the smallest positive score; where no
    score is positive the answer is infinity, so that nothing is kept.
    """
    candidates = scores[scores > 0]
    if not len(candidates):
        return np.inf
    if share >= 1:
        return float(candidates.min())
    goal = share * float(candidates.sum())
    above = 0.0  # sum of the scores known to lie above every candidate
    while len(candidates) > SMALL:
        pivot = np.partition(candidates, len(candidates) // 2)[len(candidates) // 2]
        upper = candidates[candidates > pivot]
        if above + float(upper.sum()) >= goal:
            candidates = upper
            continue
        above += float(upper.sum())
        equal = int((candidates == pivot).sum())
        if above + equal * float(pivot) >= goal:
            return float(pivot)
        above += equal * float(pivot)
        candidates = candidates[candidates < pivot]
        if not len(candidates):
            return float(pivot)
    candidates = np.sort(candidates)[::-1]
    reached = np.searchsorted(above + np.cumsum(candidates), goal)
    return float(candidates[min(int(reached), len(candidates) - 1)])


def connected(
    graph: AttributionGraph,
    node_mask: Bool[np.ndarray, " n_nodes"],
    sources: Int[np.ndarray, " n_kept"],
    targets: Int[np.ndarray, " n_kept"],
) -> Bool[np.ndarray, " n_nodes"]:
    """Drop features and errors that nothing leaves, and features that nothing enters, to a fixpoint."""
    import networkx

    structure = networkx.DiGraph()
    structure.add_nodes_from(np.flatnonzero(node_mask).tolist())
    structure.add_edges_from(zip(sources.tolist(), targets.tolist(), strict=True))
    needs_entry = graph.nodes.is_feature
    needs_exit = needs_entry | graph.nodes.is_error
    waiting = list(structure)
    while waiting:
        node = waiting.pop()
        if node not in structure:
            continue
        lost = (needs_exit[node] and not structure.out_degree(node)) or (
            needs_entry[node] and not structure.in_degree(node)
        )
        if lost:
            waiting += [*structure.predecessors(node), *structure.successors(node)]
            structure.remove_node(node)
    kept = np.zeros(graph.n_nodes, dtype=bool)
    kept[list(structure)] = True
    return kept


def check_threshold(name: str, value: float) -> None:
    """Raise InputError unless a threshold is a share in [0, 1]; a percentage is told how it is written."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        percent = number and 1 < value <= 100
        advice = f"for {value:g} percent pass {value / 100:g}" if percent else "pass a share such as 0.8"
        raise InputError(f"prune({name}={f'{value:g}' if number else repr(value)}): must be in [0, 1]; {advice}")
