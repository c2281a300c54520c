"""The graph's structure, on networkx: conversion, order, components, reachability, strongest paths, GraphML.

Every DiGraph here leads from source to target, against the adjacency's (target, source). Knows nothing of viewers.
"""

from __future__ import annotations

import heapq
from itertools import pairwise
from os import PathLike
from typing import Any, NamedTuple

import networkx
import numpy as np
from jaxtyping import Float, Int

from graphs.errors import InputError
from graphs.files import whole_file
from graphs.graph import AttributionGraph, NodeKind
from graphs.influence import topological_levels
from graphs.names import node_ids, node_names


class Path(NamedTuple):
    """One way from a token to a target."""

    nodes: tuple[int, ...]
    """Node indices, the token first, the target last."""
    weight: float
    """Signed product of the normalised edges: positive where the path pushes the target up."""
    share: float
    """Share of the targets' influence that runs along the path, in [0, 1]."""


def to_networkx(graph: AttributionGraph) -> networkx.DiGraph:
    """Return the graph as a networkx DiGraph, edges from source to target.

    Nodes are indices into `graph.nodes` with `id` (the viewers' id), `name` (words), `kind`, `layer`, `position`,
    `feature`, `activation`, `probability`, and `influence` where the graph carries it; edges have `weight` (signed) and
    `share` (|weight| over the sum of the target's row in this graph).
    """
    result = networkx.DiGraph(prompt=graph.prompt, model=graph.model, dictionaries=graph.dictionaries)
    nodes = graph.nodes
    columns: dict[str, list[Any]] = {
        "id": node_ids(graph),
        "name": node_names(graph),
        "kind": [NodeKind(kind).name.lower() for kind in nodes.kind.tolist()],
        **{key: getattr(nodes, key).tolist() for key in ("layer", "position", "feature", "activation", "probability")},
    }
    if graph.influence is not None:
        columns["influence"] = graph.influence.tolist()
    keys = list(columns)
    result.add_nodes_from(
        (i, dict(zip(keys, values, strict=True))) for i, values in enumerate(zip(*columns.values(), strict=True))
    )
    parts = (graph.edge_sources, graph.edge_targets, graph.adjacency.data, _shares(graph))
    edges = zip(*(part.tolist() for part in parts), strict=True)
    result.add_edges_from((s, t, {"weight": weight, "share": share}) for s, t, weight, share in edges)
    return result


def digraph(graph: AttributionGraph) -> networkx.DiGraph:
    """Return the bare structure of the graph (no attributes); nodes are graph indices."""
    result = networkx.DiGraph()
    result.add_nodes_from(range(graph.n_nodes))
    result.add_edges_from(zip(graph.edge_sources.tolist(), graph.edge_targets.tolist(), strict=True))
    return result


def is_dag(graph: AttributionGraph) -> bool:
    """Return whether no node can influence itself."""
    return networkx.is_directed_acyclic_graph(digraph(graph))


def generations(graph: AttributionGraph) -> Int[np.ndarray, " n_nodes"]:
    """Return each node's topological generation; raises InputError, naming a cycle, where there is one."""
    structure = digraph(graph)
    levels = np.zeros(graph.n_nodes, dtype=np.int64)
    try:
        for level, members in enumerate(networkx.topological_generations(structure)):
            levels[members] = level
    except networkx.NetworkXUnfeasible:
        ids = node_ids(graph)
        cycle = [ids[source] for source, _ in networkx.find_cycle(structure)]
        raise InputError(
            f"node_influence(graph=...): its edges form a cycle ({' -> '.join([*cycle[:6], cycle[0]])}), needs a graph "
            "without cycles; remove one of these edges"
        ) from None
    return levels


def components(graph: AttributionGraph) -> list[Int[np.ndarray, " n_members"]]:
    """Return the weakly connected components as sorted node indices, the largest component first."""
    members = [np.array(sorted(part)) for part in networkx.weakly_connected_components(digraph(graph))]
    return sorted(members, key=lambda part: (-len(part), int(part[0])))


def upstream(graph: AttributionGraph, node: int) -> Int[np.ndarray, " n_found"]:
    """Return the indices of all nodes with a way to `node`."""
    return np.array(sorted(networkx.ancestors(digraph(graph), _checked(graph, node, "upstream"))), dtype=np.int64)


def downstream(graph: AttributionGraph, node: int) -> Int[np.ndarray, " n_found"]:
    """Return the indices of all nodes that `node` has a way to."""
    return np.array(sorted(networkx.descendants(digraph(graph), _checked(graph, node, "downstream"))), dtype=np.int64)


def paths(graph: AttributionGraph, *, k: int = 5, target: int | None = None) -> list[Path]:
    """Return the k strongest paths from tokens to a target, strongest first.

    A path's strength is the product of Â[t, s] = |A[t, s]| / sum_s' |A[t, s']| along it, the share of the target's
    influence that runs along it in this graph; it is exact, by dynamic programming over the topological order.
    `target` is a node index; with None every target counts, weighted by its share of the targets' probability.
    Raises InputError for k < 1, an index outside the graph, or a cycle.
    """
    if k < 1:
        raise InputError(f"paths(k={k}): must be at least 1; pass the number of paths wanted")
    ends = graph.targets if target is None else np.array([_checked(graph, target, "paths")])
    if not len(ends):
        return []
    weights = graph.nodes.probability[ends] if target is None else np.ones(1)
    weights = weights / weights.sum() if weights.sum() > 0 else np.full(len(ends), 1 / len(ends))
    best = _strongest(graph, k)
    found = [
        (share * float(weight), nodes)
        for end, weight in zip(ends.tolist(), weights, strict=True)
        for share, nodes in (_trace_back(best, end, rank) for rank in range(len(best[end])))
        if len(nodes) > 1
    ]
    found.sort(key=lambda item: (-item[0], item[1]))
    return [Path(nodes, share * _sign(graph, nodes), share) for share, nodes in found[:k]]


def write_graphml(graph: AttributionGraph, path: str | PathLike[str]) -> None:
    """Write the graph as GraphML (for Gephi, yEd, Cytoscape); the file appears whole or not at all."""
    named = to_networkx(graph)
    named.graph = {key: "".join(c for c in str(value) if c.isprintable()) for key, value in named.graph.items()}
    named = networkx.relabel_nodes(named, dict(named.nodes(data="id")))
    with whole_file(path, call="write_graphml") as draft:
        networkx.write_graphml_xml(named, draft)


def _strongest(graph: AttributionGraph, k: int) -> list[list[tuple[float, int, int]]]:
    """Return per node its k best (share, previous node, rank there), tokens starting with share 1."""
    shares, adjacency = _shares(graph), graph.adjacency
    best: list[list[tuple[float, int, int]]] = [[] for _ in range(graph.n_nodes)]
    for node in np.argsort(topological_levels(graph), kind="stable").tolist():
        if graph.nodes.is_embedding[node]:
            best[node] = [(1.0, -1, 0)]
            continue
        entries = slice(adjacency.indptr[node], adjacency.indptr[node + 1])
        options = (
            (share * upto, -source, -rank)  # ties go to the earlier node
            for source, share in zip(adjacency.indices[entries].tolist(), shares[entries].tolist(), strict=True)
            for rank, (upto, _, _) in enumerate(best[source])
        )
        best[node] = [(share, -source, -rank) for share, source, rank in heapq.nlargest(k, options)]
    return best


def _trace_back(best: list[list[tuple[float, int, int]]], end: int, rank: int) -> tuple[float, tuple[int, ...]]:
    share, previous, previous_rank = best[end][rank]
    nodes = [end]
    while previous >= 0:
        nodes.append(previous)
        _, previous, previous_rank = best[previous][previous_rank]
    return share, tuple(reversed(nodes))


def _sign(graph: AttributionGraph, nodes: tuple[int, ...]) -> float:
    return float(np.prod([np.sign(graph.adjacency[target, source]) for source, target in pairwise(nodes)]))


def _shares(graph: AttributionGraph) -> Float[np.ndarray, " n_edges"]:
    sizes = np.abs(graph.adjacency.data.astype(np.float64))
    return sizes / graph.sum_rows(sizes)[graph.edge_targets]


def _checked(graph: AttributionGraph, node: int, call: str) -> int:
    if not 0 <= node < graph.n_nodes:
        raise InputError(f"{call}({node}): no such node, the graph has {graph.n_nodes}; pass an index into graph.nodes")
    return int(node)
