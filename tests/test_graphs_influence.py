"""Influence equals path enumeration, the matrix inverse, and what a reference tool stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from graphs import (
    InputError,
    completeness_score,
    cumulative_influence,
    edge_influence,
    node_influence,
    replacement_score,
)
from graphs.influence import flow, topological_levels
from tests.reference_graphs import (
    FIXTURES,
    fixture_graph,
    influence_by_inverse,
    influence_by_paths,
    normalised,
    random_graph,
)


@pytest.mark.parametrize("seed", range(4))
def test_influence_equals_path_enumeration(seed):
    graph = random_graph(seed, n_layers=3, n_features=9, density=0.5)
    expected = influence_by_paths(graph.dense_adjacency(), graph.nodes.probability)
    np.testing.assert_allclose(node_influence(graph), expected, rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n_layers=st.integers(1, 6),
    n_positions=st.integers(2, 6),
    n_features=st.integers(0, 40),
    n_targets=st.integers(1, 4),
    density=st.floats(0, 1),
)
def test_influence_equals_the_matrix_inverse(seed, n_layers, n_positions, n_features, n_targets, density):
    graph = random_graph(
        seed, n_layers=n_layers, n_positions=n_positions, n_features=n_features, n_targets=n_targets, density=density
    )
    expected = influence_by_inverse(graph.dense_adjacency(), graph.nodes.probability)
    np.testing.assert_allclose(node_influence(graph), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_influence_of_a_graph_whose_layers_are_no_order_is_the_same(seed):
    """Foreign files may link nodes of one layer; any order without cycles must do."""
    graph = random_graph(seed, n_layers=4, n_features=20)
    flat = np.where(graph.nodes.is_feature, 0, graph.nodes.layer)
    shuffled = replace(graph, nodes=replace(graph.nodes, layer=flat))
    assert (topological_levels(graph) == graph.nodes.depth).all()
    assert (topological_levels(shuffled) != shuffled.nodes.depth).any()
    np.testing.assert_allclose(node_influence(shuffled), node_influence(graph), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_influence_does_not_depend_on_the_order_of_nodes(seed):
    """Rows of one layer need not stand together."""
    graph = random_graph(seed, n_layers=4, n_features=30)
    order = np.random.default_rng(seed).permutation(graph.n_nodes)
    weights = csr_array(graph.dense_adjacency()[np.ix_(order, order)])
    mixed = replace(graph, nodes=graph.nodes.select(order), adjacency=weights)
    assert (topological_levels(mixed) == mixed.nodes.depth).all()
    np.testing.assert_allclose(node_influence(mixed), node_influence(graph)[order], rtol=1e-12)
    assert completeness_score(mixed) == pytest.approx(completeness_score(graph), rel=1e-12)


def test_a_cycle_is_named():
    graph = random_graph(0)
    weights = graph.dense_adjacency()
    weights[0, 1] = weights[1, 0] = 1.0
    with pytest.raises(
        InputError, match=r"node_influence\(graph=...\): its edges form a cycle \(\d+_\d+_\d+ -> .*remove one"
    ):
        node_influence(replace(graph, adjacency=csr_array(weights)))


@pytest.mark.parametrize("seed", range(3))
def test_an_edge_s_score_is_its_share_times_what_its_target_matters(seed):
    graph = random_graph(seed)
    weights, p = graph.dense_adjacency(), graph.nodes.probability
    expected = normalised(weights) * (influence_by_inverse(weights, p) + p)[:, None]
    rows = np.repeat(np.arange(graph.n_nodes), np.diff(graph.adjacency.indptr))
    np.testing.assert_allclose(edge_influence(graph), expected[rows, graph.adjacency.indices], rtol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_their_formulas(seed):
    graph = random_graph(seed, n_features=25, n_layers=4)
    weights, p, nodes = graph.dense_adjacency(), graph.nodes.probability, graph.nodes
    influence = influence_by_inverse(weights, p)
    tokens, errors = influence[nodes.is_embedding].sum(), influence[nodes.is_error].sum()
    assert replacement_score(graph) == pytest.approx(tokens / (tokens + errors), rel=1e-12)
    explained = 1 - normalised(weights)[:, nodes.is_error].sum(1)
    assert completeness_score(graph) == pytest.approx(
        (explained * (influence + p)).sum() / (influence + p).sum(), rel=1e-12
    )


def test_scores_with_a_known_flow_are_the_same():
    graph = random_graph(2, dtype=np.float32)
    for score in (replacement_score, completeness_score):
        assert score(graph, known=flow(graph)) == score(graph)


def test_a_graph_without_errors_is_complete():
    graph = random_graph(1)
    weights = graph.dense_adjacency() * ~graph.nodes.is_error[None, :]
    clean = replace(graph, adjacency=csr_array(weights))
    assert replacement_score(clean) == 1.0 and completeness_score(clean) == 1.0


def test_a_graph_without_edges_has_no_influence():
    graph = random_graph(1, density=0.0)
    assert not node_influence(graph).any()
    assert replacement_score(graph) == 1.0 and completeness_score(graph) == 1.0


def test_rows_that_sum_to_almost_nothing_stay_near_zero():
    graph = random_graph(1, n_targets=1)
    target, token = int(graph.targets[0]), int(np.flatnonzero(graph.nodes.is_embedding)[0])
    weights = np.zeros(graph.adjacency.shape)
    weights[target, token] = 1e-14
    faint = node_influence(replace(graph, adjacency=csr_array(weights)))
    assert faint[token] == pytest.approx(1e-4 * graph.nodes.probability[target])


def test_cumulative_influence_ranks_from_the_most_important():
    np.testing.assert_allclose(cumulative_influence(np.array([1.0, 5.0, 0.0, 4.0])), [1.0, 0.5, 1.0, 0.9])


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_influence_and_scores_equal_the_reference_tool_s(folder):
    graph, stored, about = fixture_graph(folder)
    influence = node_influence(graph)
    np.testing.assert_allclose(influence, stored["node_influence"], atol=2e-6)
    np.testing.assert_allclose(cumulative_influence(influence), stored["cumulative_scores"], atol=2e-6)
    assert replacement_score(graph) == pytest.approx(about["replacement_score"], abs=2e-6)
    assert completeness_score(graph) == pytest.approx(about["completeness_score"], abs=2e-6)
    assert (topological_levels(graph) == graph.nodes.depth).all()


def test_float32_weights_are_summed_in_float64():
    """Masks must not depend on the stored precision of sums."""
    graph = random_graph(2, dtype=np.float32)
    wide = replace(graph, adjacency=graph.adjacency.astype(np.float64))
    assert (node_influence(graph) == node_influence(wide)).all()
    assert (edge_influence(graph) == edge_influence(wide)).all()
