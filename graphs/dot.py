"""The picture of a graph: DOT text for Graphviz, and SVG, PNG or PDF where Graphviz is installed.

Knows colours, lines and Graphviz; where things stand is `graphs.layout`. Knows nothing of models or of stored files.
"""

from __future__ import annotations

import shutil
import subprocess
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphs.errors import InputError
from graphs.files import whole_file
from graphs.graph import AttributionGraph, NodeKind
from graphs.layout import FONT_SIZE, Layout, lay_out
from graphs.names import node_ids, node_name, printable
from graphs.names import where as layer_and_place

if TYPE_CHECKING:
    import graphviz

FONT = "Helvetica"
INK, FAINT, PAPER, STRIPE = "#22303c", "#8a97a3", "#ffffff", "#f4f6f8"
POSITIVE, NEGATIVE = (44, 110, 160), (200, 70, 50)
FILLS = {  # least and most influential, border, text
    NodeKind.FEATURE: ((255, 250, 235), (250, 190, 70), "#b9861f", INK),
    NodeKind.ERROR: ((246, 246, 246), (205, 208, 212), "#9aa3ab", "#5c6670"),
    NodeKind.EMBEDDING: ((255, 255, 255), (170, 218, 190), "#4f9a73", INK),
    NodeKind.LOGIT: ((120, 110, 170), (74, 60, 140), "#3c3175", "#ffffff"),
}
FORMATS = ("svg", "png", "pdf")
LEFT, TOP, BOTTOM = 64.0, 46.0, 44.0
"""Room for the row titles, the heading, and the legend, in points."""


def to_dot(graph: AttributionGraph, *, max_nodes: int = 40, title: str | None = None) -> graphviz.Digraph:
    """Return the picture as a `graphviz.Digraph`: columns are tokens, rows are layers, with every place worked out.

    Colour is by kind and deeper for more influence; edges are as wide as their share of the target's input, blue where
    they push it up and red where they push it down. `max_nodes` bounds features, errors and targets together (the most
    influential stay, one line says what was left out). `title` defaults to the prompt. Draw the text with
    `dot -Tsvg`. Raises InputError for max_nodes < 1 or a graph with a cycle.
    """
    import graphviz

    if max_nodes < 1:
        raise InputError(f"to_dot(max_nodes={max_nodes}): must be at least 1; 40 is readable")
    layout = lay_out(graph, max_nodes=max_nodes)
    picture = graphviz.Digraph("circuit", comment="draw with: dot -Tsvg")
    picture.attr("graph", outputorder="edgesfirst", bgcolor=PAPER, splines="true", pad="0.15", layout="nop2")
    picture.attr("graph", _background=_background(layout, printable(title or graph.prompt)), tooltip=" ")
    picture.attr(
        "node", shape="box", style="filled,rounded", fixedsize="true", fontname=FONT, fontsize=f"{FONT_SIZE:g}"
    )
    picture.attr("edge", arrowhead="none")
    ids = node_ids(graph)
    _draw_frame(picture, layout)
    _draw_nodes(picture, graph, layout, ids)
    _draw_edges(picture, graph, layout, ids)
    return picture


def render(
    graph: AttributionGraph,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    max_nodes: int = 40,
    title: str | None = None,
) -> None:
    """Draw the graph to a file, whole or not at all.

    `format` is svg, png or pdf (default: the path's suffix), or dot for the text itself, which needs no Graphviz; the
    other arguments are those of `to_dot`. Raises InputError for another format or where Graphviz is not installed.
    """
    kind = format or Path(path).suffix.lstrip(".").lower()
    if kind not in (*FORMATS, "dot"):
        raise InputError(f"render(format={kind!r}): must be one of {', '.join((*FORMATS, 'dot'))}; choose one of them")
    picture = to_dot(graph, max_nodes=max_nodes, title=title)
    if kind == "dot":
        content = picture.source.encode("utf-8")
    elif shutil.which("dot") is None:
        raise InputError(
            f"render(format={kind!r}): Graphviz is not installed (no `dot` on the PATH); install it (apt-get install "
            "graphviz, brew install graphviz) or write format 'dot' and draw it elsewhere with dot -Tsvg"
        )
    else:
        if kind == "png":
            picture.attr("graph", dpi="144")
        try:
            content = picture.pipe(format=kind, quiet=True)
        except subprocess.CalledProcessError as problem:
            reason = (problem.stderr or b"").decode("utf-8", "replace").strip().splitlines()
            raise InputError(
                f"render(format={kind!r}): Graphviz failed ({reason[0] if reason else problem}); "
                "write format 'dot' and draw it elsewhere with dot -Tsvg"
            ) from problem
    with whole_file(path, call="render") as draft:
        draft.write_bytes(content)


def _draw_frame(picture: graphviz.Digraph, layout: Layout) -> None:
    """Two invisible corners make the picture as large as its background."""
    width, height = _extent(layout)
    for name, x, y in (("corner low", -LEFT, -BOTTOM), ("corner high", width, height + TOP)):
        picture.node(name, label="", pos=f"{x:.1f},{y:.1f}", width="0.01", height="0.01", style="invis")


def _draw_nodes(picture: graphviz.Digraph, graph: AttributionGraph, layout: Layout, ids: list[str]) -> None:
    import graphviz

    nodes = graph.nodes
    for i, node in enumerate(layout.nodes.tolist()):
        kind = NodeKind(int(nodes.kind[node]))
        pale, deep, border, text = FILLS[kind]
        (x, y), (width, height) = layout.centre[i], layout.size[i]
        picture.node(
            ids[node],
            label=graphviz.nohtml("\n".join(line.replace("\\", "\\\\") for line in layout.lines[i])),
            pos=f"{x:.1f},{y:.1f}",
            width=f"{width / 72:.3f}",
            height=f"{height / 72:.3f}",
            fillcolor=_mix(pale, deep, float(layout.importance[i])),
            color=border,
            fontcolor=text,
            penwidth="0.8",
            tooltip=graphviz.nohtml(_tooltip(graph, node)),
            **({"fontsize": "8.5"} if kind is NodeKind.ERROR else {}),
        )


def _draw_edges(picture: graphviz.Digraph, graph: AttributionGraph, layout: Layout, ids: list[str]) -> None:
    sources, targets, weights = graph.edge_sources, graph.edge_targets, graph.adjacency.data
    totals = graph.sum_rows(np.abs(weights))
    place = {node: i for i, node in enumerate(layout.nodes.tolist())}
    ends = _ports(layout, [(place[sources[e]], place[targets[e]]) for e in layout.edges.tolist()])
    for edge, (start, end) in zip(layout.edges.tolist(), ends, strict=True):
        source, target, weight = int(sources[edge]), int(targets[edge]), float(weights[edge])
        share = abs(weight) / totals[target]
        red, green, blue = POSITIVE if weight > 0 else NEGATIVE
        picture.edge(
            ids[source],
            ids[target],
            pos=_curve(layout, start, end),
            penwidth=f"{0.6 + 5.0 * share:.2f}",
            color=f"#{red:02x}{green:02x}{blue:02x}{int(48 + 180 * share**0.5):02x}",
            tooltip=f"{printable(node_name(graph, source))} → {printable(node_name(graph, target))}: {weight:+.3g}",
        )


def _ports(layout: Layout, edges: list[tuple[int, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return where each edge leaves its source's top and enters its target's bottom, spread so that few cross there."""
    sides: list[dict[int, list[int]]] = [{}, {}]
    for number, edge in enumerate(edges):
        for side in (0, 1):
            sides[side].setdefault(edge[side], []).append(number)
    points = np.zeros((len(edges), 2, 2))
    for side, sign in ((0, 0.5), (1, -0.5)):
        for box, numbers in sides[side].items():
            numbers.sort(key=lambda number: (layout.centre[edges[number][1 - side], 0], number))
            width = min(0.7 * layout.size[box, 0], 9.0 * (len(numbers) - 1))
            for number, offset in zip(numbers, np.linspace(-width / 2, width / 2, len(numbers)), strict=True):
                points[number, side] = layout.centre[box] + (offset, sign * layout.size[box, 1])
    return [(start, end) for start, end in points]


def _curve(layout: Layout, start: np.ndarray, end: np.ndarray) -> str:
    """Return a Bezier curve upwards between two points, bowed where boxes hide a straight one."""
    (x0, y0), (x1, y1) = start, end
    between = (layout.centre[:, 1] > y0) & (layout.centre[:, 1] < y1)
    hidden = bool((between & (np.abs(layout.centre[:, 0] - (x0 + x1) / 2) < layout.size[:, 0] / 2)).any())
    bow = 90.0 if hidden and abs(x1 - x0) < 40 else 0.0
    pull = 0.45 * (y1 - y0)
    points = [(x0, y0), (x0 + bow, y0 + pull), (x1 + bow, y1 - pull), (x1, y1)]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _tooltip(graph: AttributionGraph, node: int) -> str:
    nodes = graph.nodes
    where = f"position {int(nodes.position[node])}"
    if nodes.is_feature[node]:
        where = (
            f"{layer_and_place(graph, node)} #{int(nodes.feature[node])}, {where}, "
            f"activation {nodes.activation[node]:.3g}"
        )
    return f"{node_name(graph, node)} ({where})".replace("\\", "\\\\")


def _background(layout: Layout, title: str) -> str:
    """Return stripes, titles and legend as xdot drawing operations."""
    width, height = _extent(layout)
    ops = []
    for number, column in enumerate(layout.columns):
        if number % 2 == 0:
            ops.append(_box(column.low, 0.0, column.high, height, STRIPE))
    for before, after in zip(layout.columns, layout.columns[1:], strict=False):
        if after.low > before.high:
            ops.append(_text((before.high + after.low) / 2, 20.0, "…", 12.0, FAINT, align=0))
    for row in layout.rows:
        ops.append(_text(-8.0, (row.low + row.high) / 2 - 3, row.title, 9.0, FAINT, align=1))
    room = max(int(width / (0.6 * 15)), 20)
    ops.append(_text(0.0, height + 18, title if len(title) <= room else title[: room - 1] + "…", 15.0, INK))
    x = 0.0
    for kind, word in zip(FILLS, ("feature", "error: what the dictionaries missed", "token", "output"), strict=True):
        ops += [_box(x, -22.0, x + 10, -12.0, _mix(*FILLS[kind][:2], 0.9)), _text(x + 14, -21.0, word, 9.0, INK)]
        x += 30 + 4.7 * len(word)
    for colour, word in ((POSITIVE, "pushes up"), (NEGATIVE, "pushes down")):
        ops += [_box(x, -18.5, x + 16, -16.0, _mix(colour, colour, 0.0)), _text(x + 20, -21.0, word, 9.0, INK)]
        x += 36 + 4.7 * len(word)
    if layout.note:
        ops.append(_text(0.0, -38.0, layout.note, 9.0, FAINT))
    return " ".join(ops)


def _box(x0: float, y0: float, x1: float, y1: float, colour: str) -> str:
    corners = " ".join(f"{x:.1f} {y:.1f}" for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)))
    return f"c {len(colour)} -{colour} C {len(colour)} -{colour} P 4 {corners}"


def _text(x: float, y: float, text: str, size: float, colour: str, align: int = -1) -> str:
    content = text.replace("\\", "/").replace('"', "'")
    n_bytes = len(content.encode("utf-8"))
    width = 0.5 * size * len(content)
    return (
        f"F {size:g} {len(FONT)} -{FONT} c {len(colour)} -{colour} "
        f"T {x:.1f} {y:.1f} {align} {width:.1f} {n_bytes} -{content}"
    )


def _extent(layout: Layout) -> tuple[float, float]:
    return max((c.high for c in layout.columns), default=0.0), max((r.high for r in layout.rows), default=0.0)


def _mix(pale: tuple[int, int, int], deep: tuple[int, int, int], share: float) -> str:
    return "#" + "".join(f"{round(p + (d - p) * share):02x}" for p, d in zip(pale, deep, strict=True))
