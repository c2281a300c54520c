"""The picture: nothing overlaps, columns are tokens, rows are layers, and Graphviz draws it where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from graphs import InputError, node_influence, prune, render, to_dot
from graphs.layout import MAX_LINES, lay_out
from tests.reference_graphs import random_graph

DRAWS = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")


def crowded(seed=0, **arguments):
    return prune(random_graph(seed, **{"n_layers": 3, "n_positions": 4, "n_features": 60, "n_targets": 4} | arguments))


@pytest.mark.parametrize(
    "graph", [crowded(), crowded(1, n_positions=30), crowded(2, n_features=0), crowded(3, n_targets=9)]
)
def test_no_two_boxes_overlap_and_all_stand_in_their_column(graph):
    layout = lay_out(graph, max_nodes=60)
    low, high = layout.centre - layout.size / 2, layout.centre + layout.size / 2
    for i in range(len(layout.nodes)):
        apart = (low >= high[i] - 1e-9) | (high <= low[i] + 1e-9)
        apart[i] = True
        assert apart.any(1).all(), "two boxes overlap"
    for i, node in enumerate(layout.nodes.tolist()):
        title = graph.tokens[graph.nodes.position[node]]
        column = [c for c in layout.columns if c.low <= low[i, 0] and high[i, 0] <= c.high]
        assert [c.title for c in column] == [title]
        row = [r for r in layout.rows if r.low <= low[i, 1] and high[i, 1] <= r.high]
        layer = int(graph.nodes.layer[node])
        assert [r.title for r in row] == ["tokens" if layer < 0 else "output" if layer == 3 else f"layer {layer}"]


def test_the_most_influential_nodes_are_shown_and_the_rest_is_told():
    graph = crowded()
    layout = lay_out(graph, max_nodes=12)
    inner = graph.nodes.is_feature | graph.nodes.is_error
    shown = np.isin(np.arange(graph.n_nodes), layout.nodes)
    influence = node_influence(graph)
    assert shown[inner].sum() == 12 - 4 and shown[graph.nodes.is_embedding].all()
    assert influence[shown & inner].min() >= influence[~shown & inner].max()
    assert layout.note.startswith(f"shown: {len(layout.nodes)} of {graph.n_nodes} nodes, ")
    assert layout.note in to_dot(graph, max_nodes=12).source


def test_every_shown_node_keeps_its_strongest_way_in_and_out():
    graph = crowded()
    layout = lay_out(graph)
    rows = np.repeat(np.arange(graph.n_nodes), np.diff(graph.adjacency.indptr))
    sources = graph.adjacency.indices
    inside = np.isin(rows, layout.nodes) & np.isin(sources, layout.nodes)
    assert set(rows[layout.edges]) == set(rows[inside]) and set(sources[layout.edges]) == set(sources[inside])


def test_words_are_short_lines_and_fall_back_to_numbers():
    graph = crowded()
    label = ("a very long label that goes on about many things and on and on", *graph.nodes.label[1:])
    layout = lay_out(replace(graph, nodes=replace(graph.nodes, label=label)))
    by_node = dict(zip(layout.nodes.tolist(), layout.lines, strict=True))
    assert len(by_node[0]) == MAX_LINES and by_node[0][-1].endswith("…")
    assert by_node[1] == (f"L{graph.nodes.layer[1]} #{graph.nodes.feature[1]}",)
    assert by_node[int(graph.targets[0])][-1].endswith(" %")


def test_a_whole_small_graph_needs_no_note():
    graph = prune(random_graph(1, n_features=2, density=0.2, n_layers=1), node_threshold=1.0, edge_threshold=1.0)
    assert lay_out(graph, max_nodes=60).note == ""


def test_dot_text_is_the_same_every_time_and_holds_odd_text():
    graph = crowded()
    odd = ('<b>"x"\\n\x00\ud800', *graph.nodes.label[1:])
    graph = replace(graph, nodes=replace(graph.nodes, label=odd), prompt='say "hi" \\ <b>')
    assert to_dot(graph).source == to_dot(graph).source
    assert "\x00" not in to_dot(graph).source
    to_dot(graph).source.encode("utf-8")


@DRAWS
@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_graphviz_draws_it(kind, start, tmp_path):
    graph = crowded()
    odd = ('<b>"x"\\n\x00\ud800', "<bos>", *graph.nodes.label[2:])
    render(replace(graph, nodes=replace(graph.nodes, label=odd)), tmp_path / f"x.{kind}", title='a "title" <b>')
    assert (tmp_path / f"x.{kind}").read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{kind}"]


@DRAWS
def test_the_text_alone_draws_with_plain_dot(tmp_path):
    render(crowded(), tmp_path / "x.dot")
    drawn = subprocess.run(["dot", "-Tsvg", str(tmp_path / "x.dot")], capture_output=True, check=True, text=True)
    assert "layer 0" in drawn.stdout and "answer0" in drawn.stdout and not drawn.stderr


def test_without_graphviz_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        InputError, match=r"render\(format='svg'\): Graphviz is not installed .*write format 'dot'"
    ) as caught:
        render(crowded(), tmp_path / "x.svg")
    assert "\n" not in str(caught.value)
    render(crowded(), tmp_path / "x.dot")
    assert [path.name for path in tmp_path.iterdir()] == ["x.dot"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: to_dot(crowded(), max_nodes=0), r"to_dot\(max_nodes=0\): must be at least 1; 40 is readable"),
        (lambda path: render(crowded(), path / "x.gif"), r"render\(format='gif'\): must be one of svg, png, pdf, dot"),
        (lambda path: render(crowded(), path / "no" / "x.dot"), r"render\(path=.*does not exist; create it first"),
    ],
)
def test_impossible_pictures_are_refused(call, message, tmp_path):
    with pytest.raises(InputError, match=message):
        call(tmp_path)
