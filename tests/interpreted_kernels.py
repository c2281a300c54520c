"""Laws of the kernels for GPUs, held in Triton's interpreter, which runs them on a CPU, program by program.

Whether Triton interprets is settled when it is imported: `test_replacement_training_kernels.py` runs this file in a
process of its own, with `TRITON_INTERPRET=1`. Memory that nothing has written reads as NaN here.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replacement.training.sparse import ActiveSet, decode_active, encode_active, kernels, products, select_top
from tests.test_replacement_training_sparse import dense, sparse, weights

PIECE = kernels.PIECE
LENGTHS = {  # of segments
    "usual": [3, 0, 32, 1, 17, 0],
    "whole pieces": [PIECE, PIECE, 2 * PIECE],
    "about a piece": [PIECE - 1, 2, PIECE + 1, 2 * PIECE - 1],
    "one of many pieces": [5, 20 * PIECE + 7, 5],
    "empty first and last": [0, 0, PIECE + 9, 0],
    "all empty": [0, 0, 0],
    "one": [40],
    "none": [],
}
ROUNDED = {  # a result's own relative error; the interpreter cuts what a GPU rounds to bfloat16
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def segments(lengths: list[int], n_rows: int, dtype: torch.dtype, of_index: torch.dtype):
    """Indices (never 0), weights and starts of segments of these lengths."""
    generator, n = torch.Generator().manual_seed(1), sum(lengths)
    index = torch.randint(1, n_rows, (n,), generator=generator, dtype=of_index)
    counts = torch.tensor(lengths, dtype=of_index)
    return index, torch.randn(n, generator=generator).to(dtype), (counts.cumsum(0) - counts).to(of_index)


def close(found: torch.Tensor, terms: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Each result is the sum of its terms (float64), within rounding of the sum and of what is added up."""
    assert found.dtype == dtype and len(found) == len(terms)
    sums = 1e-15 if dtype == torch.float64 else 1e-6
    for one, of_it in zip(found.double(), terms, strict=True):
        expected, size = of_it.sum(0), of_it.abs().sum(0)
        assert ((one - expected).abs() <= ROUNDED[dtype] * expected.abs() + sums * size).all()


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(("d", "of_index"), [(1, torch.int64), (5, torch.int32), (300, torch.int64)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_sums_equal_brute_force(lengths: str, d: int, of_index: torch.dtype, dtype: torch.dtype) -> None:
    """Whatever the segments, the width and the precision; a row that no entry names is never read."""
    table = rows_of(20, d, dtype)
    table[0] = torch.nan
    index, weight, starts = segments(LENGTHS[lengths], 20, dtype, of_index)
    terms = weight.double()[:, None] * table.double()[index]
    close(kernels.sums(table, index, weight, starts), list(terms.split(LENGTHS[lengths])), dtype)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize(("n", "d"), [(0, 5), (1, 1), (40, 5), (130, 256), (33, 600)])
def test_dots_equal_brute_force(n: int, d: int, dtype: torch.dtype) -> None:
    a, b = rows_of(7, d, dtype), rows_of(11, d, dtype, seed=2)
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(7, (n,), generator=generator).sort().values
    column = torch.randint(11, (n,), generator=generator).int()
    close(kernels.dots(a, b, row, column), list(a.double()[row] * b.double()[column]), dtype)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=8), seed=st.integers(0, 99))
def test_where_segments_are_cut_changes_no_sum(lengths: list[int], seed: int) -> None:
    """Short pieces, so that many cuts fall within segments of a few entries."""
    table = rows_of(9, 3, torch.float64, seed)
    given = segments(lengths, 9, torch.float64, torch.int64)
    whole = products.sums(table, *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PIECE", 8)
        torch.testing.assert_close(kernels.sums(table, *given), whole)


@pytest.mark.parametrize("n_segments", [1, 2, 127, 128, 129, 20_000])
def test_the_search_finds_the_segment_of_every_piece(n_segments: int) -> None:
    """A piece is summed if and only if one segment holds it, however many segments there are."""
    generator = torch.Generator().manual_seed(n_segments)
    cuts = torch.randint(0, 12 * PIECE, (n_segments - 1,), generator=generator) // 100 * 100  # most are empty
    starts, entries = torch.cat([cuts.new_zeros(1), cuts.sort().values]), 12 * PIECE
    table, pieces = torch.ones(1, 1), torch.full((12, 1), torch.nan)
    index, weight = torch.zeros(entries, dtype=torch.int64), torch.ones(entries)
    sizes = {"PIECE": PIECE, "ENTRIES": PIECE, "COLUMNS": 1}
    kernels.sum_pieces[12, 1](pieces, table, index, weight, starts, entries, n_segments, 1, **sizes)
    for piece, found in enumerate(pieces.flatten()):
        within = (starts > piece * PIECE) & (starts < (piece + 1) * PIECE)
        assert bool(found.isnan()) == bool(within.any())
        assert found.isnan() or found == PIECE


def test_strided_and_expanded_tensors_are_read_as_they_look() -> None:
    """Gradients come expanded, tables as slices of wider ones."""
    table, index = rows_of(30, 12, torch.float64)[::3, 2:7], torch.arange(10).repeat(2)[::2]
    weight, starts = torch.ones(1, dtype=torch.float64).expand(10), torch.tensor([0, 0, 4, 4, 9])[::2]
    torch.testing.assert_close(
        kernels.sums(table, index, weight, starts), products.sums(table, index.clone(), weight.clone(), starts.clone())
    )
    row = torch.arange(10)
    torch.testing.assert_close(kernels.dots(table, table, row, index), (table * table[index]).sum(1))


@pytest.mark.parametrize("prefixes", [(), (3, 10)])
def test_decoding_and_all_gradients_equal_the_dense_ones(prefixes: tuple[int, ...], monkeypatch) -> None:
    """The whole sparse path on the kernels, against plain matrix products in float64."""
    monkeypatch.setattr(products, "kernels_on", lambda device: kernels)
    x, W_enc, b_enc = weights(11, 5, 24, dtype=torch.float64)
    tensors = [x, W_enc, b_enc, rows_of(24, 7, torch.float64)]
    active = select_top(x, W_enc, b_enc, 4)
    sides = []
    for decode in (sparse, dense):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = decode(*leaves, active, prefixes)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        sides.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, plain in zip(*sides, strict=True):
        torch.testing.assert_close(fast, plain)


def test_an_empty_set_gives_zeros(monkeypatch) -> None:
    """Early in training nothing may fire."""
    monkeypatch.setattr(products, "kernels_on", lambda device: kernels)
    leaves = [t.requires_grad_() for t in (*weights(6, 4, 64), rows_of(64, 3, torch.float32))]
    none = torch.empty(0, dtype=torch.long)
    active = ActiveSet(none, none, 6, 64)
    out = decode_active(encode_active(*leaves[:3], active), leaves[3], active, (8,))
    out.sum().backward()
    assert out.shape == (6, 2, 3) and not out.any()
    assert not any(leaf.grad.any() for leaf in leaves)
