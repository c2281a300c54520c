"""Conversion, order, components, reachability and paths agree with brute force and survive a round trip."""

from __future__ import annotations

from dataclasses import replace

import networkx
import numpy as np
import pytest
from scipy.sparse import csr_array

from graphs import InputError, components, paths, prune, to_networkx, write_graphml
from graphs.structure import downstream, generations, is_dag, upstream
from tests.reference_graphs import normalised, random_graph


def test_edges_lead_from_source_to_target_with_signed_weights():
    graph = random_graph(1)
    structure = to_networkx(graph)
    weights, shares = graph.dense_adjacency(), normalised(graph.dense_adjacency())
    assert structure.number_of_edges() == graph.n_edges and structure.number_of_nodes() == graph.n_nodes
    for source, target, edge in structure.edges(data=True):
        assert edge["weight"] == weights[target, source]
        assert edge["share"] == pytest.approx(shares[target, source])
    assert (weights == networkx.to_numpy_array(structure, nodelist=range(graph.n_nodes)).T).all()


def test_nodes_carry_words_and_ids():
    graph = random_graph(1)
    nodes = graph.to_networkx().nodes
    assert nodes[0]["name"] == "a label" and nodes[0]["kind"] == "feature"
    assert nodes[1]["name"] == f"L{graph.nodes.layer[1]} #{graph.nodes.feature[1]}"
    assert len({data["id"] for _, data in nodes(data=True)}) == graph.n_nodes
    assert "influence" not in nodes[0] and "influence" in prune(graph).to_networkx().nodes[0]


def every_path(graph, target):
    """All paths from tokens to a target with their strengths and signs, by walking back."""
    weights, shares = graph.dense_adjacency(), normalised(graph.dense_adjacency())
    found = []

    def walk(node, nodes, share, sign):
        if graph.nodes.is_embedding[node]:
            found.append((share, sign, tuple(nodes[::-1])))
        for source in np.flatnonzero(weights[node]).tolist():
            walk(source, [*nodes, source], share * shares[node, source], sign * np.sign(weights[node, source]))

    walk(target, [target], 1.0, 1.0)
    return sorted(found, reverse=True)


@pytest.mark.parametrize("k", [1, 5, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_paths_equal_enumeration(seed, k):
    graph = random_graph(seed, n_features=8, density=0.5)
    target = int(graph.targets[0])
    expected, found = every_path(graph, target)[:k], paths(graph, k=k, target=target)
    np.testing.assert_allclose([path.share for path in found], [share for share, _, _ in expected])
    by_nodes = {nodes: (share, sign) for share, sign, nodes in every_path(graph, target)}
    for path in found:
        share, sign = by_nodes[path.nodes]
        assert path.share == pytest.approx(share) and path.weight == pytest.approx(share * sign)


def test_paths_to_all_targets_are_weighted_by_probability():
    graph = random_graph(2, n_features=8)
    p = graph.nodes.probability / graph.nodes.probability.sum()
    expected = sorted(
        (share * p[t] for t in graph.targets.tolist() for share, _, _ in every_path(graph, t)), reverse=True
    )
    np.testing.assert_allclose([path.share for path in paths(graph, k=7)], expected[:7])


def test_all_paths_and_errors_together_make_the_whole_influence():
    graph = random_graph(1, n_features=8, density=1.0)
    graph = replace(graph, adjacency=csr_array(graph.dense_adjacency() * ~graph.nodes.is_error[None, :]))
    assert sum(path.share for path in paths(graph, k=10**5)) == pytest.approx(1.0)


def test_a_graph_without_edges_has_no_paths():
    assert paths(random_graph(1, density=0.0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"k": 0}, r"paths\(k=0\): must be at least 1"), ({"target": 999}, r"paths\(999\): no such node, the graph has")],
)
def test_impossible_paths_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        paths(random_graph(), **arguments)


def test_generations_put_every_edge_upwards_and_a_cycle_is_seen():
    graph = random_graph(3)
    levels = generations(graph)
    rows, sources = graph.adjacency.tocoo().coords
    assert (levels[sources] < levels[rows]).all() and is_dag(graph)
    weights = graph.dense_adjacency()
    weights[0, 1] = weights[1, 0] = 1.0
    cyclic = replace(graph, adjacency=csr_array(weights))
    assert not is_dag(cyclic)
    with pytest.raises(InputError, match="form a cycle"):
        paths(cyclic)


def test_components_cover_the_graph_once_largest_first():
    graph = random_graph(3, density=0.05)
    parts = components(graph)
    assert sorted(np.concatenate(parts).tolist()) == list(range(graph.n_nodes))
    assert [len(part) for part in parts] == sorted(map(len, parts), reverse=True) and len(parts) > 1


def test_reachability_is_the_transitive_closure():
    graph = random_graph(4, density=0.3)
    step = (graph.dense_adjacency() != 0).astype(float)
    reach = np.linalg.inv(np.eye(graph.n_nodes) - step) - np.eye(graph.n_nodes) > 0.5
    for node in (0, int(graph.targets[0]), int(np.flatnonzero(graph.nodes.is_embedding)[1])):
        assert upstream(graph, node).tolist() == np.flatnonzero(reach[node]).tolist()
        assert downstream(graph, node).tolist() == np.flatnonzero(reach[:, node]).tolist()


def test_graphml_comes_back_the_same(tmp_path):
    """Labels with control characters too, which XML can't hold as they are."""
    graph = random_graph(1)
    labels = ('a\x00\x19\ud800<b>&"', *graph.nodes.label[1:])
    graph = replace(graph, prompt="x\x01y", nodes=replace(graph.nodes, label=labels))
    write_graphml(graph, tmp_path / "x.graphml")
    found, expected = networkx.read_graphml(tmp_path / "x.graphml"), to_networkx(graph)
    ids = dict(expected.nodes(data="id"))
    assert set(found) == set(ids.values())
    for source, target, edge in expected.edges(data=True):
        assert found[ids[source]][ids[target]]["weight"] == edge["weight"]
    assert found.nodes[ids[0]]["name"] == 'a\\x00\\x19\\udc00<b>&"'.replace("dc00", "d800")
    assert [path.name for path in tmp_path.iterdir()] == ["x.graphml"]
