"""How rows become a graph: the node table, and one sparse matrix that the rows move into.

Knows rows and the local model; nothing of how rows are computed, or in which order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from circuits.rows import Block
from circuits.targets import Target
from circuits.tracer import Tracer
from graphs.graph import MLP, AttributionGraph, NodeKind, NodeTable, row_residual
from replacement.local import LocalModel
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot


class Edges(NamedTuple):
    """All rows as one matrix, and what of them stands beside it."""

    adjacency: csr_array
    """[n_nodes, n_nodes], the rows of nodes that have none empty."""
    sums: Float[np.ndarray, "4 n_nodes"]
    """By node: bias, what position 0 writes, what was dropped, what untraced features contribute."""


def assemble(model: ReplacementModel, tracer: Tracer, prompt: str, settings: dict[str, Any]) -> AttributionGraph:
    """Node table in the reference order and the square sparse matrix; the tracer's rows are used up by it.

    Rows move into the matrix one block at a time, so that both together take little more than the rows alone.
    """
    local, targets, has_drop = tracer.local, tracer.targets, bool(tracer.drop)
    selected = np.sort(tracer.order)
    nodes = _nodes(model, local, targets, selected)
    n_features, n_nodes, n_all = len(selected), len(nodes), len(local.features.layer)
    column = np.full(tracer.n_sources, -1, dtype=np.int32)  # where a source goes; -1 for features that are no nodes
    column[selected] = np.arange(n_features)
    column[n_all:] = n_features + np.arange(tracer.n_sources - n_all)
    edges = _edges(tracer.blocks, column, selected, n_nodes, n_targets=len(targets))
    pre_activation = np.zeros(n_nodes)
    pre_activation[:n_features] = nodes.activation[:n_features]
    pre_activation[n_nodes - len(targets) :] = [target.value for target in targets]
    tokens = local.forward.tokens
    graph = AttributionGraph(
        nodes=nodes,
        adjacency=edges.adjacency,
        bias=edges.sums[0],
        bos=edges.sums[1],
        untraced=edges.sums[3],
        dropped=edges.sums[2] if has_drop else None,
        pre_activation=pre_activation,
        prompt=prompt,
        tokens=tuple(model.token_strings(tokens)),
        token_ids=tokens.cpu().numpy(),
        n_layers=local.n_layers,
        model=model.name,
        dictionaries=model.coverage.name,
        n_active_features=n_all,
        settings=settings,
    )
    return replace(graph, residual=row_residual(graph))


def _edges(
    blocks: list[Block],
    column: Int[np.ndarray, " n_sources"],
    selected: Int[np.ndarray, " n_features"],
    n_nodes: int,
    *,
    n_targets: int,
) -> Edges:
    """Move the rows out of the list of blocks into one matrix, each to its node's place."""
    lengths, sums = np.zeros(n_nodes, dtype=np.int64), np.zeros((4, n_nodes))
    places = []
    for block in blocks:
        place = n_nodes - n_targets + block.index if block.of_targets else np.searchsorted(selected, block.index)
        sums[:3, place] = block.constants.T
        for node, weights, sources in _by_row(block.rows, place.tolist(), column):
            stays = sources >= 0
            lengths[node] = np.count_nonzero(stays)
            if lengths[node] < len(stays):
                sums[3, node] = weights[~stays].sum(dtype=np.float64)
        places.append(place)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if starts[-1] <= np.iinfo(np.int32).max:  # scipy would copy the sources to have both of one width
        starts = starts.astype(np.int32)
    all_weights, all_sources = np.empty(starts[-1], blocks[0].rows.dtype), np.empty(starts[-1], dtype=np.int32)
    while blocks:
        for node, weights, sources in _by_row(blocks.pop().rows, places.pop().tolist(), column):
            into = slice(starts[node], starts[node + 1])
            if lengths[node] < len(sources):
                stays = sources >= 0
                weights, sources = weights[stays], sources[stays]
            all_weights[into], all_sources[into] = weights, sources
    return Edges(csr_array((all_weights, all_sources, starts), shape=(n_nodes, n_nodes)), sums)


def _by_row(
    rows: csr_array, places: Sequence[int], column: Int[np.ndarray, " n_sources"]
) -> Iterator[tuple[int, Float[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Each row's node, its weights, and the nodes that they come from, -1 for none."""
    data, indices, starts = rows.data, rows.indices, rows.indptr.tolist()
    for node, start, end in zip(places, starts[:-1], starts[1:], strict=True):
        yield node, data[start:end], column[indices[start:end]]


def _nodes(model: ReplacementModel, local: LocalModel, targets: list[Target], selected: np.ndarray) -> NodeTable:
    """Features, errors (slot-major), embeddings, targets."""
    n_pos, n_targets, n_errors = local.n_positions, len(targets), len(local.slots) * local.n_positions
    layer, place, position, feature, activation = (column.cpu().numpy()[selected] for column in local.features)
    positions, zeros = np.arange(n_pos), np.zeros(n_errors + n_pos + n_targets)
    tokens = local.forward.tokens
    features = zip(layer.tolist(), place.tolist(), feature.tolist(), strict=True)
    slots = np.array(local.slots, dtype=int).reshape(-1, 2)
    at_layer, at_place = np.repeat(slots, n_pos, axis=0).T
    return NodeTable(
        kind=np.repeat(
            [NodeKind.FEATURE, NodeKind.ERROR, NodeKind.EMBEDDING, NodeKind.LOGIT],
            [len(selected), n_errors, n_pos, n_targets],
        ),
        layer=np.concatenate([layer, at_layer, np.full(n_pos, -1), np.full(n_targets, local.n_layers)]),
        place=np.concatenate([place, at_place, np.full(n_pos + n_targets, MLP)]),
        position=np.concatenate(
            [position, np.tile(positions, len(local.slots)), positions, [t.position for t in targets]]
        ),
        feature=np.concatenate(
            [feature, np.full(n_errors, -1), tokens.cpu().numpy(), [target.token for target in targets]]
        ),
        activation=np.concatenate([activation, zeros]),
        probability=np.concatenate([np.zeros(len(selected) + n_errors + n_pos), [t.weight for t in targets]]),
        label=(
            *(model.coverage.label(Slot(layer, Place(place)), feature) for layer, place, feature in features),
            *[""] * n_errors,
            *model.token_strings(tokens),
            *(target.label for target in targets),
        ),
    )
