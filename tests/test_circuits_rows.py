"""Rows lose their smallest edges only, no more of them than was asked for, and what is lost is accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import attribute
from circuits.rows import LARGE_DROP, WHOLE_ENTRIES, chosen_drop, store
from graphs import AttributionGraph, prune, row_residual
from replacement import InputError
from tests.tiny import PROMPT


def random_rows(seed: int, n_rows: int, n_sources: int, density: float, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n_rows, n_sources)) * np.exp(2 * rng.normal(size=(n_rows, n_sources)))
    return (rows * (rng.random((n_rows, n_sources)) < density)).astype(dtype)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n_rows=st.integers(0, 4),
    n_sources=st.integers(0, 6000),
    density=st.floats(0, 1),
    drop=st.floats(0, 0.9),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_the_smallest_edges_go_as_far_as_the_share_lets(seed, n_rows, n_sources, density, drop, dtype):
    """Against sorting: what goes is the longest prefix of the ascending sizes whose sum is within the share."""
    rows = random_rows(seed, n_rows, n_sources, density, dtype)
    stored = store(rows, drop=drop)
    kept = stored.kept.toarray()
    assert stored.kept.dtype == dtype and stored.kept.shape == rows.shape
    assert (kept[kept != 0] == rows[kept != 0]).all()
    np.testing.assert_allclose(stored.dropped, (rows - kept).astype(np.float64).sum(1), rtol=1e-9, atol=1e-9)
    shares = [0.0]
    for row, left in zip(np.abs(rows.astype(np.float64)), kept, strict=True):
        total, lost = row.sum(), row[left == 0].sum()
        assert lost <= drop * total * (1 + 1e-9)
        shares.append(lost / total if total else 0.0)
        sizes = np.sort(row[row > 0])
        within = np.searchsorted(np.cumsum(sizes), drop * total * (1 - 1e-9), side="right")
        assert np.count_nonzero(left) <= len(sizes) - within
    assert stored.share == pytest.approx(max(shares), rel=1e-9)


def test_a_drop_of_nothing_is_the_plain_sparse_form():
    rows = random_rows(0, 3, 50, 0.5, np.float32)
    stored = store(rows, drop=0.0)
    assert (stored.kept.toarray() == rows).all() and stored.kept.nnz == np.count_nonzero(rows)
    assert not stored.dropped.any() and stored.share == 0.0


@pytest.mark.parametrize("max_features", [None, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_rows_add_up_with_what_was_dropped(tiny_model, dtype, tolerance, max_features):
    model = tiny_model("llama", "skip_transcoder", "relu", dtype)
    whole = attribute(model, PROMPT, max_features=max_features, drop=0.0)
    graph = attribute(model, PROMPT, max_features=max_features, drop=0.05)
    assert graph.n_edges < whole.n_edges and graph.dropped is not None and graph.dropped.any()
    assert graph.residual == row_residual(graph) <= tolerance
    assert 0 < graph.settings["dropped_share"] <= graph.settings["drop"] * (1 + 1e-9) and graph.settings["drop"] == 0.05
    if max_features is None:
        edges, fewer = (np.abs(one.dense_adjacency().astype(np.float64)) for one in (whole, graph))
        assert (fewer[fewer > 0] == edges[fewer > 0]).all()
        lost = (edges - fewer).sum(1)
        assert (lost <= 0.05 * edges.sum(1) * (1 + 1e-9)).all()
        assert lost.max() > 0.04 * edges.sum(1)[lost.argmax()]


def test_a_graph_keeps_what_was_dropped_in_its_file_and_when_pruned(tiny_model, tmp_path):
    graph = attribute(tiny_model("llama", "transcoder", "relu", "float32"), PROMPT, drop=0.05)
    graph.save(tmp_path / "graph")
    loaded = AttributionGraph.load(tmp_path / "graph")
    assert (loaded.dropped == graph.dropped).all() and row_residual(loaded) == graph.residual
    small = prune(graph, node_threshold=0.5)
    assert len(small.dropped) == small.n_nodes and small.dropped[-1] == graph.dropped[-1]


def test_small_graphs_keep_everything_unless_told_otherwise(tiny_model):
    model = tiny_model("llama", "transcoder", "relu", "float32")
    graph, plain = attribute(model, PROMPT), attribute(model, PROMPT, drop=0)
    assert graph.dropped is plain.dropped is None
    assert graph.settings == plain.settings and graph.settings["drop"] == graph.settings["dropped_share"] == 0.0
    assert (graph.adjacency.data == plain.adjacency.data).all()


def test_large_graphs_drop_a_little_unless_told_otherwise(tiny_model, monkeypatch):
    assert chosen_drop(None, n_rows=WHOLE_ENTRIES // 1000, n_sources=1000) == 0
    assert chosen_drop(None, n_rows=WHOLE_ENTRIES // 1000 + 1, n_sources=1000) == LARGE_DROP
    assert chosen_drop(0.0, n_rows=WHOLE_ENTRIES, n_sources=1000) == 0
    monkeypatch.setattr("circuits.rows.WHOLE_ENTRIES", 100)
    graph = attribute(tiny_model("llama", "transcoder", "relu", "float32"), PROMPT)
    assert graph.settings["drop"] == LARGE_DROP and graph.dropped.any() and graph.residual <= 1e-5


@pytest.mark.parametrize("drop", [-0.1, 1, 5, True, "0.1", float("nan")])
def test_a_share_outside_its_range_is_refused(tiny_model, drop):
    with pytest.raises(
        InputError, match=r"attribute\(drop=.*\): must be in \[0, 1\); for 0.1 percent of every row pass"
    ):
        attribute(tiny_model("llama", "transcoder", "relu", "float32"), PROMPT, drop=drop)
