"""Laws of the graph itself: rows add up, tables are consistent, importing it imports no model library."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array

import graphs
from graphs import AttributionGraph, InputError, NodeKind, row_residual
from tests.reference_graphs import random_graph


def test_public_names_are_these():
    names = """
        AttributionGraph InputError NodeKind NodeTable Path completeness_score components cumulative_influence
        edge_influence node_influence paths prune prune_masks read_neuronpedia render replacement_score row_residual
        to_dot to_networkx to_neuronpedia upload_problems write_graphml write_neuronpedia
    """
    assert graphs.__all__ == names.split()
    for name in graphs.__all__:
        assert getattr(graphs, name) is not None


def test_using_everything_imports_no_model_library():
    program = (
        "import sys, graphs\n"
        "early = {'numpy', 'scipy', 'networkx'} & set(sys.modules)\n"
        "assert not early, f'importing graphs imports {early}'\n"
        "[getattr(graphs, name) for name in graphs.__all__]\n"
        "late = {'torch', 'transformers', 'transformer_lens', 'replacement', 'circuits'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_kinds_keep_their_numbers():
    """Files store them."""
    assert [kind.name for kind in NodeKind] == ["FEATURE", "ERROR", "EMBEDDING", "LOGIT"]
    assert [int(kind) for kind in NodeKind] == [0, 1, 2, 3]


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_rows_that_add_up_have_no_residual(dtype, bound):
    assert row_residual(random_graph(3, dtype=dtype)) <= bound


def test_residual_is_the_largest_relative_gap():
    graph = random_graph(4)
    row = int(graph.targets[0])
    pre = np.array(graph.pre_activation)
    pre[row] += 0.5
    scale = max(abs(pre[row]), np.abs(graph.dense_adjacency()[row]).sum())
    assert row_residual(replace(graph, pre_activation=pre)) == pytest.approx(0.5 / scale)


def test_residual_ignores_nodes_without_inputs():
    graph = random_graph(4)
    pre = np.array(graph.pre_activation)
    pre[np.flatnonzero(graph.nodes.is_error)[0]] = 7.0
    assert row_residual(replace(graph, pre_activation=pre)) < 1e-12


def test_dense_adjacency_has_rows_as_targets():
    graph = random_graph(0, n_layers=1, n_positions=2, n_features=0, n_targets=1)
    assert graph.dense_adjacency().shape == (5, 5)
    assert not graph.dense_adjacency()[~graph.nodes.has_inputs].any()
    assert graph.dense_adjacency()[graph.targets].any()


def test_construction_leaves_the_callers_matrix_alone_and_drops_zeros_and_duplicates():
    graph = random_graph(1)
    row, source = int(graph.targets[0]), int(np.flatnonzero(graph.nodes.is_embedding)[0])
    edges = csr_array((np.array([1.0, 2.0, 0.0]), np.array([source, source, 0]), _pointers(graph.n_nodes, row, 3)))
    before = edges.nnz
    built = replace(graph, adjacency=csr_array(edges, shape=graph.adjacency.shape))
    assert built.n_edges == 1 and built.dense_adjacency()[row, source] == 3.0
    assert edges.nnz == before


def _pointers(n_nodes: int, row: int, n_edges: int) -> np.ndarray:
    return np.where(np.arange(n_nodes + 1) > row, n_edges, 0)


def test_node_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        random_graph().nodes.layer[0] = 9


@pytest.mark.parametrize("as_mask", [True, False])
def test_select_keeps_rows_and_labels_together(as_mask):
    nodes = random_graph(2).nodes
    mask = nodes.is_logit
    chosen = nodes.select(mask if as_mask else np.flatnonzero(mask))
    assert len(chosen) == 2 and chosen.label == (" answer0", " answer1")
    assert (chosen.probability == nodes.probability[mask]).all()


def test_subgraph_keeps_edges_between_kept_nodes():
    graph = random_graph(5)
    mask = np.random.default_rng(0).random(graph.n_nodes) < 0.6
    small = graph.subgraph(mask)
    assert (small.dense_adjacency() == graph.dense_adjacency()[np.ix_(mask, mask)]).all()
    assert (small.bias == graph.bias[mask]).all() and small.residual == graph.residual


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(3)}, r"AttributionGraph\(bias=...\): got shape \(3,\), needs one value for each of the"),
        ({"bos": "nan"}, r"AttributionGraph\(bos=...\): got NaN or infinity"),
        ({"adjacency": csr_array((2, 2))}, r"AttributionGraph\(adjacency=...\): got shape \(2, 2\), needs"),
        ({"adjacency": "int"}, r"AttributionGraph\(adjacency=...\): got int64 weights, needs float32 or float64"),
        ({"adjacency": "nan"}, r"AttributionGraph\(adjacency=...\): got NaN or infinity, needs finite weights"),
        (
            {"token_ids": np.zeros(1, dtype=np.int64)},
            r"AttributionGraph\(token_ids=...\): got shape \(1,\), needs one id",
        ),
    ],
)
def test_a_broken_part_is_named(change, message):
    graph = random_graph()
    if change.get("bos") == "nan":
        change = {"bos": np.full(graph.n_nodes, np.nan)}
    if isinstance(change.get("adjacency"), str):
        broken = graph.adjacency.astype(np.int64) if change["adjacency"] == "int" else graph.adjacency * np.nan
        change = {"adjacency": broken}
    with pytest.raises(InputError, match=message):
        replace(graph, **change)


def test_a_node_table_of_unequal_columns_is_refused():
    nodes = random_graph().nodes
    with pytest.raises(InputError, match=r"NodeTable\(label=...\): got shape \(1,\), needs one value per node"):
        replace(nodes, label=("x",))
    with pytest.raises(InputError, match=r"NodeTable\(probability=...\): got -1.0, needs weights of 0 or more"):
        replace(nodes, probability=np.full(len(nodes), -1.0))
    with pytest.raises(InputError, match="needs the values of NodeKind"):
        replace(nodes, kind=np.full(len(nodes), 4))


def test_a_graph_knows_its_sizes():
    graph = random_graph(6)
    assert isinstance(graph, AttributionGraph)
    assert graph.n_edges == np.count_nonzero(graph.dense_adjacency())
    assert graph.n_positions == 4 and graph.targets.tolist() == [graph.n_nodes - 2, graph.n_nodes - 1]
