"""Influence along the rows known so far is the sum over all paths, however rows lie in blocks; the best are picked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuits import selection
from circuits.rows import Block, store
from circuits.selection import MIN_ROW_SUM, partial_influence, strongest

N_FEATURES, N_OTHERS, N_TARGETS, TOP = 30, 5, 3, 6


def known_rows(seed: int, dtype: type, batch: int) -> tuple[list[Block], np.ndarray, np.ndarray]:
    """Random rows in blocks, and the same dense: a square over features, others and targets, empty where unknown."""
    rng = np.random.default_rng(seed)
    depth = np.sort(rng.integers(0, TOP, N_FEATURES))
    n_sources = N_FEATURES + N_OTHERS
    square = np.zeros((n_sources + N_TARGETS, n_sources + N_TARGETS))
    blocks = []
    known = np.flatnonzero(rng.random(N_FEATURES) < 0.6)
    groups = [(TOP, True, np.arange(N_TARGETS))] + [(d, False, known[depth[known] == d]) for d in range(TOP)]
    for at, of_targets, members in groups:
        for start in range(0, len(members), batch):
            index = members[start : start + batch]
            dense = rng.normal(size=(len(index), n_sources)) * (rng.random((len(index), n_sources)) < 0.5)
            dense[:, :N_FEATURES][:, depth >= at] = 0
            dense = dense.astype(dtype)
            square[index + (n_sources if of_targets else 0), :n_sources] = dense
            stored = store(dense, drop=0.0)
            blocks.append(Block(at, of_targets, index, stored.kept, stored.sums, np.zeros((len(index), 3)), 0.0))
    rng.shuffle(blocks)
    return blocks, square, known


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), batch=st.integers(1, 9), piece=st.sampled_from([1, 7, 2**18]))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_influence_is_the_sum_over_all_paths(dtype, seed, batch, piece):
    """Against p (Â + Â² + ...) of the dense square, whose powers end with the deepest path."""
    blocks, square, _ = known_rows(seed, dtype, batch)
    weights = np.array([0.5, 0.2, 0.0])
    absolute = np.abs(square)
    normal = absolute / np.maximum(absolute.sum(1, keepdims=True), MIN_ROW_SUM)
    weight = np.concatenate([np.zeros(N_FEATURES + N_OTHERS), weights])
    expected, step = np.zeros(len(square)), weight
    for _ in range(TOP + 1):
        step = step @ normal
        expected += step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PIECE", piece)
        found = partial_influence(blocks, weights, N_FEATURES + N_OTHERS)
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), size=st.integers(0, 40), ties=st.booleans(), count=st.integers(0, 45))
def test_the_strongest_are_those_of_a_stable_sort(seed, size, ties, count):
    rng = np.random.default_rng(seed)
    influence = rng.integers(0, 4, size).astype(float) if ties else rng.random(size)
    known = np.flatnonzero(rng.random(size) < 0.3)
    everything = np.argsort(-influence, kind="stable")
    expected = [one for one in everything.tolist() if one not in known.tolist()][:count]
    assert strongest(influence, known, count).tolist() == expected
