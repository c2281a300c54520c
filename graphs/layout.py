"""Where things stand in a picture of a graph: which nodes and edges are shown, at which place, in which words.

Columns are tokens, rows are layers from the bottom up; all lengths are points (1/72 inch). Knows nothing of drawing,
colours or file formats.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from graphs.graph import AttributionGraph, NodeKind
from graphs.influence import edge_influence, node_influence
from graphs.names import node_name, printable

FONT_SIZE = 10.0
LINE_HEIGHT = 12.0
BOX_WIDTH = 96.0
LINE_CHARACTERS = 17
MAX_LINES = 3
MAX_TARGETS = 5
ALL_COLUMNS = 16
"""Prompts up to this many tokens show every token; longer ones only those with something to show."""
EDGES_PER_NODE = 2
GAP_X, GAP_Y = 10.0, 14.0
COLUMN_MARGIN, ROW_MARGIN = 9.0, 26.0


class Span(NamedTuple):
    """A column or row of the picture."""

    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Layout:
    """The shown part of a graph with its places; boxes are given by centre and size."""

    nodes: Int[np.ndarray, " n_shown"]
    """Indices into the graph's nodes."""
    centre: Float[np.ndarray, "n_shown 2"]
    size: Float[np.ndarray, "n_shown 2"]
    lines: tuple[tuple[str, ...], ...]
    """The words in each box."""
    importance: Float[np.ndarray, " n_shown"]
    """Influence relative to the most influential node of the same kind, in [0, 1]."""
    edges: Int[np.ndarray, " n_shown_edges"]
    """Indices into `adjacency.data`, the least important first."""
    columns: tuple[Span, ...]
    rows: tuple[Span, ...]
    note: str
    """What the picture leaves out, "" if nothing."""


def lay_out(graph: AttributionGraph, *, max_nodes: int = 40) -> Layout:
    """Choose the most influential nodes and place them so that no two overlap.

    `max_nodes` bounds features, errors and targets together; tokens come on top of that.
    """
    influence = node_influence(graph)
    shown = _shown(graph, influence, max_nodes)
    lines = tuple(_lines(graph, node) for node in shown.tolist())
    size = np.array([_box(graph, node, text) for node, text in zip(shown.tolist(), lines, strict=True)]).reshape(-1, 2)
    centre, columns, rows = _place(graph, shown, size, influence)
    edges = _shown_edges(graph, shown, len(shown) * EDGES_PER_NODE)
    return Layout(
        nodes=shown,
        centre=centre,
        size=size,
        lines=lines,
        importance=_importance(graph, shown, influence),
        edges=edges,
        columns=columns,
        rows=rows,
        note=_note(graph, shown, edges, influence),
    )


def _shown(graph: AttributionGraph, influence: Float[np.ndarray, " n_nodes"], max_nodes: int) -> np.ndarray:
    nodes = graph.nodes
    targets = graph.targets[np.argsort(-nodes.probability[graph.targets], kind="stable")][: min(MAX_TARGETS, max_nodes)]
    inner = np.flatnonzero((nodes.is_feature | nodes.is_error) & (influence > 0))
    inner = inner[np.argsort(-influence[inner], kind="stable")][: max_nodes - len(targets)]
    tokens = np.flatnonzero(nodes.is_embedding)
    if graph.n_positions > ALL_COLUMNS:
        strong = tokens[np.argsort(-influence[tokens], kind="stable")][:ALL_COLUMNS]
        used = np.unique(nodes.position[np.concatenate([targets, inner])])
        tokens = tokens[np.isin(tokens, strong) | np.isin(nodes.position[tokens], used)]
    return np.sort(np.concatenate([targets, inner, tokens])).astype(np.int64)


def _shown_edges(graph: AttributionGraph, shown: Int[np.ndarray, " n_shown"], n_edges: int) -> np.ndarray:
    """Return the strongest edges between shown nodes, and in any case each node's strongest way in and way out."""
    sources, targets = graph.edge_sources, graph.edge_targets
    inside = np.flatnonzero(np.isin(targets, shown) & np.isin(sources, shown))
    scores = edge_influence(graph)
    order = inside[np.argsort(-scores[inside], kind="stable")]
    kept = set(order[:n_edges].tolist())
    for ends in (targets, sources):
        _, first = np.unique(ends[order], return_index=True)
        kept.update(order[first][scores[order[first]] > 0].tolist())
    return np.array(sorted(kept, key=lambda edge: (scores[edge], -edge)), dtype=np.int64)


def _place(
    graph: AttributionGraph,
    shown: Int[np.ndarray, " n_shown"],
    size: Float[np.ndarray, "n_shown 2"],
    influence: Float[np.ndarray, " n_nodes"],
) -> tuple[np.ndarray, tuple[Span, ...], tuple[Span, ...]]:
    """Give each (row, column) cell a small grid of boxes, then each column and row the room that its cells need."""
    nodes = graph.nodes
    row_of = np.where(nodes.is_embedding, -1, np.where(nodes.is_logit, graph.n_layers, nodes.layer))[shown]
    column_of = nodes.position[shown]
    cells: dict[tuple[int, int], list[int]] = {}
    for i in np.argsort(-influence[shown], kind="stable").tolist():
        cells.setdefault((int(row_of[i]), int(column_of[i])), []).append(i)
    depth, probability = nodes.depth[shown], nodes.probability[shown]
    cells = {  # likely targets first; later places of a layer above earlier ones
        cell: sorted(members, key=lambda i: (-probability[i], -depth[i])) for cell, members in cells.items()
    }
    grids = {cell: _grid(members, size, one_row=cell[0] == graph.n_layers) for cell, members in cells.items()}
    widths = {p: max(grids[c][1] for c in cells if c[1] == p) for p in sorted(set(column_of.tolist()))}
    heights = {r: max(grids[c][2] for c in cells if c[0] == r) for r in sorted(set(row_of.tolist()))}
    columns, rows = _columns(graph, widths), _rows(graph, heights)
    centre = np.zeros((len(shown), 2))
    for (row, column), (places, _, _) in grids.items():
        middle = np.array([sum(columns[column][:2]) / 2, sum(rows[row][:2]) / 2])
        for i, place in places.items():
            centre[i] = middle + place
    return centre, tuple(columns.values()), tuple(rows.values())


def _grid(
    members: list[int], size: Float[np.ndarray, "n_shown 2"], *, one_row: bool
) -> tuple[dict[int, np.ndarray], float, float]:
    """Return the places of a cell's boxes around its middle, its width and its height."""
    n_columns = len(members) if one_row or len(members) <= 2 else 2 if len(members) <= 6 else 3
    rows = [members[i : i + n_columns] for i in range(0, len(members), n_columns)][::-1]
    width = max(sum(size[i, 0] for i in row) + GAP_X * (len(row) - 1) for row in rows)
    height = sum(max(size[i, 1] for i in row) for row in rows) + GAP_Y * (len(rows) - 1)
    places, y = {}, -height / 2
    for row in rows:
        tall = max(size[i, 1] for i in row)
        x = -(sum(size[i, 0] for i in row) + GAP_X * (len(row) - 1)) / 2
        for i in row:
            places[i] = np.array([x + size[i, 0] / 2, y + tall / 2])
            x += size[i, 0] + GAP_X
        y += tall + GAP_Y
    return places, width, height


def _columns(graph: AttributionGraph, widths: dict[int, float]) -> dict[int, Span]:
    spans, x, before = {}, 0.0, -1
    for position, width in widths.items():
        x += 24.0 if position > before + 1 else 0.0  # room for an ellipsis
        spans[position] = Span(x, x + width + 2 * COLUMN_MARGIN, printable(graph.tokens[position]))
        x, before = spans[position].high, position
    return spans


def _rows(graph: AttributionGraph, heights: dict[int, float]) -> dict[int, Span]:
    spans, y = {}, 0.0
    for row, height in heights.items():
        title = "tokens" if row < 0 else "output" if row == graph.n_layers else f"layer {row}"
        spans[row] = Span(y, y + height + 2 * ROW_MARGIN, title)
        y = spans[row].high
    return spans


def _lines(graph: AttributionGraph, node: int) -> tuple[str, ...]:
    """Return a node's words in a few short lines; an ellipsis says that there were more."""
    kind = NodeKind(int(graph.nodes.kind[node]))
    if kind is NodeKind.ERROR:
        return ("error",)
    text = " ".join(node_name(graph, node).split()) or "␣"
    lines = textwrap.wrap(text, LINE_CHARACTERS, break_on_hyphens=False) or [text]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: LINE_CHARACTERS - 1].rstrip(" ,;") + "…"]
    if kind is NodeKind.LOGIT:
        lines.append(f"{100 * graph.nodes.probability[node]:.3g} %")
    return tuple(lines)


def _box(graph: AttributionGraph, node: int, lines: tuple[str, ...]) -> tuple[float, float]:
    height = len(lines) * LINE_HEIGHT + 12
    if graph.nodes.is_error[node]:
        return 38.0, height - 2
    if graph.nodes.is_embedding[node]:
        return max(34.0, max(map(len, lines)) * FONT_SIZE * 0.62 + 14), height
    return (BOX_WIDTH if graph.nodes.is_feature[node] else max(map(len, lines)) * FONT_SIZE * 0.66 + 20), height


def _importance(graph: AttributionGraph, shown: np.ndarray, influence: np.ndarray) -> np.ndarray:
    weight = influence + graph.nodes.probability
    best = {kind: weight[graph.nodes.kind == kind].max(initial=0.0) for kind in NodeKind}
    return np.array(
        [weight[i] / best[graph.nodes.kind[i]] if best[graph.nodes.kind[i]] else 0.0 for i in shown.tolist()]
    )


def _note(graph: AttributionGraph, shown: np.ndarray, edges: np.ndarray, influence: np.ndarray) -> str:
    if len(shown) == graph.n_nodes and len(edges) == graph.n_edges:
        return ""
    inner = graph.nodes.is_feature | graph.nodes.is_error
    total, kept = influence[inner].sum(), influence[shown[inner[shown]]].sum()
    share = f", {100 * kept / total:.0f} % of the features' and errors' influence" if total > 0 else ""
    return f"shown: {len(shown)} of {graph.n_nodes} nodes, {len(edges)} of {graph.n_edges} edges{share}"
