"""What a report says of a graph: sums that must hold, and routes held against every path counted one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.sparse import csr_array

from circuits import display
from circuits.report import Prediction, as_json, error_share, report, routes, size, sources, themes
from graphs import AttributionGraph, NodeKind, NodeTable, completeness_score, node_influence, replacement_score
from graphs.structure import to_networkx
from tests.reference_graphs import random_graph


def texas() -> AttributionGraph:
    """Dallas -> Texas (layers 0 and 1) -> say Austin -> Austin, and beside it an error and the token "capital"."""
    names = ("Texas", "Texas", "say Austin", "", "capital", "Dallas", "Austin")
    feature, error, token, logit = NodeKind.FEATURE, NodeKind.ERROR, NodeKind.EMBEDDING, NodeKind.LOGIT
    weights = np.zeros((7, 7))
    weights[0, 5] = 2.0  # Dallas -> Texas, layer 0
    weights[1, [0, 5]] = 1.0, 1.0  # -> Texas, layer 1
    weights[2, [0, 1, 4]] = 1.0, 2.0, -1.0  # -> say Austin
    weights[6, [2, 3, 4]] = 3.0, 1.0, 1.0  # -> Austin
    nodes = NodeTable(
        kind=[feature, feature, feature, error, token, token, logit],
        layer=[0, 1, 2, 2, -1, -1, 3],
        position=[1, 1, 2, 2, 0, 1, 2],
        feature=[11, 12, 13, -1, 7, 8, 9],
        activation=[2.0, 2.0, 2.0, 0, 0, 0, 0],
        probability=[0, 0, 0, 0, 0, 0, 0.9],
        label=names,
    )
    zeros = np.zeros(7)
    return AttributionGraph(
        nodes=nodes, adjacency=csr_array(weights), bias=zeros, bos=zeros, untraced=zeros, pre_activation=weights.sum(1),
        prompt="capital Dallas is", tokens=("capital", "Dallas", "is"), token_ids=[7, 8, 3], n_layers=3, model="toy",
        dictionaries="toys", n_active_features=3,
    )  # fmt: skip


def test_paths_that_read_alike_are_one_route():
    found = routes(texas(), k=5)
    assert [str(route) for route in found] == [
        'Dallas -> "Texas" (L0-1) -> "say Austin" (L2 at is) -> Austin',
        "capital -> Austin",
        'capital -> "say Austin" (L2 at is) -> Austin',
    ]
    assert [route.paths for route in found] == [3, 1, 1]
    assert [route.sign for route in found] == [1, 1, -1]
    assert [route.share for route in found] == pytest.approx([0.6 * 0.75, 0.2, 0.6 * 0.25])


def _path_mass(graph: AttributionGraph) -> float:
    """Share of the targets' influence on all paths from tokens, path by path."""
    structure = to_networkx(graph)
    weights = graph.nodes.probability[graph.targets] / graph.nodes.probability[graph.targets].sum()

    def upto(node: int) -> float:
        if graph.nodes.is_embedding[node]:
            return 1.0
        return sum(data["share"] * upto(source) for source, _, data in structure.in_edges(node, data=True))

    return float(sum(weight * upto(target) for weight, target in zip(weights, graph.targets.tolist(), strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_routes_hold_all_paths_of_a_small_graph(seed: int):
    """No path is lost and none is counted twice: the shares of all routes are the tokens' whole influence."""
    graph = random_graph(seed, n_features=6) if seed else texas()
    assert sum(route.share for route in routes(graph, k=1000)) == pytest.approx(_path_mass(graph))


def test_themes_share_out_the_features_influence():
    graph = texas()
    found = {theme.words: theme for theme in themes(graph, k=9)}
    influence = node_influence(graph)
    assert set(found) == {"say Austin", "Texas"}
    assert sum(theme.share for theme in found.values()) == pytest.approx(1)
    texas_theme = found["Texas"]
    assert texas_theme.share == pytest.approx(influence[:2].sum() / influence[:3].sum())
    assert texas_theme[2:] == ((0, 1), ("Dallas",), 2)


def test_sources_share_out_the_tokens_influence():
    influence = node_influence(texas())
    found = sources(texas())
    assert [source.token for source in found] == ["Dallas", "capital"]
    assert found[0].share == pytest.approx(influence[5] / influence[4:6].sum())


def test_sizes_and_scores_are_those_of_the_graph():
    graph = texas()
    counted = size(graph)
    assert counted[:4] == (7, 3, 1, graph.n_edges)
    assert counted.replacement_score == replacement_score(graph)
    assert counted.completeness_score == completeness_score(graph)
    influence = node_influence(graph)
    assert counted.error_share == error_share(graph) == pytest.approx(influence[3] / influence.sum())


def test_a_report_is_json_with_the_same_names():
    facts = report(texas(), texas(), predictions=(Prediction("Austin", 0.9),))
    said = json.loads(json.dumps(as_json(facts), allow_nan=False))
    assert said["predictions"] == [{"token": "Austin", "probability": 0.9}]
    assert said["routes"][0]["words"] == str(facts.routes[0])
    assert said["routes"][0]["steps"][1]["layers"] == [0, 1]


def test_a_report_fits_100_columns(capsys: pytest.CaptureFixture[str]):
    display.show(report(texas(), texas()), took="0.1 s")
    said = capsys.readouterr().out
    assert "capital Dallas is ─▶ Austin" in said
    assert '45.0%  +  Dallas ─▶ "Texas" (L0-1) ─▶ "say Austin" (L2 at is) ─▶ Austin' in said
    assert max(map(len, said.splitlines())) <= 100
    assert not any(line.endswith(" ") for line in said.splitlines())
