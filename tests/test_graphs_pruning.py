"""Pruning equals the dense definition and a reference tool's masks."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import InputError, NodeKind, cumulative_influence, edge_influence, node_influence, prune, prune_masks
from graphs.pruning import connected, selection_threshold
from tests.reference_graphs import FIXTURES, dense_edges, fixture_graph, prune_densely, random_graph, sorted_threshold

THRESHOLDS = [(0.8, 0.98), (0.5, 0.9), (0.3, 0.3), (1.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
@pytest.mark.parametrize(("name", "node_threshold", "edge_threshold"), [("80_98", 0.8, 0.98), ("50_90", 0.5, 0.9)])
def test_masks_equal_the_reference_tool_s(folder, name, node_threshold, edge_threshold):
    graph, stored, _ = fixture_graph(folder)
    masks = prune_masks(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    expected = np.zeros(graph.adjacency.shape, dtype=bool)
    expected[tuple(stored[f"edge_mask_{name}_idx"].T)] = True
    assert (masks.nodes == stored[f"node_mask_{name}"].astype(bool)).all()
    assert (dense_edges(graph, masks.edges) == expected).all()


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_edge_scores_on_the_kept_nodes_equal_the_reference_tool_s(folder):
    graph, stored, _ = fixture_graph(folder)
    influence = node_influence(graph)
    kept = (influence >= selection_threshold(influence, 0.8)) | (graph.nodes.kind >= 2)
    small = graph.subgraph(kept)
    scores = np.zeros(small.adjacency.shape)
    rows = np.repeat(np.arange(small.n_nodes), np.diff(small.adjacency.indptr))
    scores[rows, small.adjacency.indices] = edge_influence(small)
    whole = np.zeros(graph.adjacency.shape)
    whole[np.ix_(kept, kept)] = scores
    expected = np.zeros(graph.adjacency.shape)
    expected[tuple(stored["edge_scores_80_idx"].T)] = stored["edge_scores_80_val"]
    np.testing.assert_allclose(whole, expected, atol=2e-6)


@pytest.mark.parametrize(("node_threshold", "edge_threshold"), THRESHOLDS)
@pytest.mark.parametrize("seed", range(4))
def test_masks_equal_the_dense_definition(seed, node_threshold, edge_threshold):
    graph = random_graph(seed, n_layers=4, n_positions=5, n_features=40, n_targets=3)
    masks = prune_masks(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    expected = prune_densely(graph, node_threshold, edge_threshold)
    assert (masks.nodes == expected.nodes).all()
    assert (dense_edges(graph, masks.edges) == expected.edges).all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20), node_threshold=st.floats(0, 1), edge_threshold=st.floats(0, 1), density=st.floats(0, 1)
)
def test_every_kept_feature_has_a_way_in_and_out(seed, node_threshold, edge_threshold, density):
    graph = random_graph(seed, n_layers=4, n_features=30, density=density)
    small = prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    structure = small.to_networkx()
    for node in structure:
        if small.nodes.is_feature[node]:
            assert structure.in_degree(node) and structure.out_degree(node)
        if small.nodes.is_error[node]:
            assert structure.out_degree(node)
    assert networkx.is_directed_acyclic_graph(structure)
    assert small.nodes.is_embedding.sum() == graph.nodes.is_embedding.sum()
    assert len(small.targets) == len(graph.targets)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), density=st.floats(0, 0.3), kept=st.floats(0, 1))
def test_the_fixpoint_equals_removing_nodes_one_at_a_time(seed, density, kept):
    """On networkx, in any order: what has no way in or out goes, until nothing does."""
    graph = random_graph(seed, n_layers=6, n_features=40, density=density)
    rng = np.random.default_rng(seed)
    always = graph.nodes.kind >= NodeKind.EMBEDDING
    nodes = always | (rng.random(graph.n_nodes) < kept)
    sources, targets = graph.edge_sources, graph.edge_targets
    inside = nodes[sources] & nodes[targets]
    structure = networkx.DiGraph(zip(sources[inside].tolist(), targets[inside].tolist(), strict=True))
    structure.add_nodes_from(np.flatnonzero(nodes).tolist())
    while lost := [
        node
        for node in structure
        if not always[node]
        and not (structure.out_degree(node) and (graph.nodes.is_error[node] or structure.in_degree(node)))
    ]:
        structure.remove_node(lost[int(rng.integers(len(lost)))])
    found = connected(graph, nodes, sources[inside], targets[inside])
    assert np.flatnonzero(found).tolist() == sorted(structure)


def test_pruning_keeps_order_sums_weights_and_says_what_it_did():
    graph = random_graph(3, n_features=40, n_layers=4)
    small = prune(graph)
    masks = prune_masks(graph)
    kept = np.flatnonzero(masks.nodes)
    assert (small.nodes.feature == graph.nodes.feature[kept]).all()
    assert (small.bias == graph.bias[kept]).all() and (small.pre_activation == graph.pre_activation[kept]).all()
    assert (small.influence == cumulative_influence(node_influence(graph))[kept]).all()
    expected = graph.dense_adjacency() * dense_edges(graph, masks.edges)
    assert (small.dense_adjacency() == expected[np.ix_(kept, kept)]).all()
    assert small.residual == graph.residual and small.adjacency.dtype == graph.adjacency.dtype
    record = small.settings["pruning"]
    assert (record["node_threshold"], record["edge_threshold"]) == (0.8, 0.98)
    assert (record["n_nodes"], record["n_edges"]) == (graph.n_nodes, graph.n_edges)
    assert small.settings["engine"] == "random" and "pruning" not in graph.settings


def test_keeping_everything_keeps_all_that_matters():
    graph = random_graph(3, density=1.0)
    small = prune(graph, node_threshold=1.0, edge_threshold=1.0)
    assert small.n_edges == np.count_nonzero(edge_influence(graph))


def test_lower_thresholds_keep_fewer_nodes():
    graph = random_graph(8, n_features=60, n_layers=5)
    sizes = [prune(graph, node_threshold=share).n_nodes for share in (0.2, 0.5, 0.8, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.integers(0, 20000), share=st.floats(0, 1), ties=st.booleans())
def test_selection_equals_sorting(seed, size, share, ties):
    """The kept scores hold the share and no fewer of them do, up to the rounding of sums."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 20, size).astype(float) if ties else rng.exponential(size=size) ** 3
    found, total = selection_threshold(scores, share), scores.sum()
    if not total:
        assert found == np.inf
        return
    rounding = 1e-12 * total
    assert found in scores and scores[scores >= found].sum() >= share * total - rounding
    assert scores[scores > found].sum() <= share * total + rounding
    if 0.01 < share < 0.99:
        assert found == sorted_threshold(scores, share)
    if share == 1.0:
        assert found == scores[scores > 0].min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"node_threshold": 80}, r"^prune\(node_threshold=80\): must be in \[0, 1\]; for 80 percent pass 0.8$"),
        ({"edge_threshold": 98.5}, r"^prune\(edge_threshold=98.5\): must be in \[0, 1\]; for 98.5 percent pass 0.985$"),
        ({"node_threshold": -0.1}, r"^prune\(node_threshold=-0.1\): must be in \[0, 1\]; pass a share such as 0.8$"),
        ({"node_threshold": float("nan")}, r"^prune\(node_threshold=nan\): must be in \[0, 1\]; pass a share"),
        ({"edge_threshold": "0.9"}, r"^prune\(edge_threshold='0.9'\): must be in \[0, 1\]; pass a share"),
        ({"edge_threshold": True}, r"^prune\(edge_threshold=True\): must be in \[0, 1\]; pass a share"),
    ],
)
def test_a_threshold_outside_the_unit_interval_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        prune(random_graph(), **arguments)
