"""Triton kernels for GPUs of what `products` is made of: weighted sums of rows, and products of pairs of rows.

Every sum has one order: no atomics, and where a segment begins and ends decides alone how it is cut. Two runs on one
kind of GPU give the same bits. Knows nothing of features, tokens and gradients. Needs Triton, which torch's builds for
GPUs bring.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 128
"""Entries, a power of two, that get a program of their own where one segment holds them all: a popular feature fires at
thousands of tokens, and a single program after them all would outlast everything else."""
_BYTES = 1 << 14  # of running sums in one program: few enough to stay in registers
_WIDEST = 256  # columns of one program
_WAYS = tl.constexpr(128)  # places looked at in one step of the search for a segment
_IN_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


class Tile(NamedTuple):
    """What one program takes at once; both are powers of two."""

    entries: int
    columns: int


def sums(
    table: Float[Tensor, "rows d"],
    index: Int[Tensor, " entries"],
    weight: Float[Tensor, " entries"],
    starts: Int[Tensor, " segments"],
) -> Float[Tensor, "segments d"]:
    """`out[s] = sum of weight[e] table[index[e]]` over the entries from `starts[s]` to the next segment's.

    Summed in float32 (float64 of float64) whatever the table is kept in, and rounded once.

    starts: ascending from 0; an empty segment starts where the next one does.
    """
    assert table.dtype == weight.dtype, (table.dtype, weight.dtype)
    table, index, weight, starts = (each.contiguous() for each in (table, index, weight, starts))
    entries, segments, d = len(index), len(starts), table.shape[1]
    if not (entries and segments and d):
        return table.new_zeros(segments, d)
    exact = summed_in(table.dtype)
    tile = tile_of(d, exact)
    out, pieces = table.new_empty(segments, d), table.new_empty(entries // PIECE, d, dtype=exact)
    given = (table, index, weight, starts, entries, segments, d)
    # fused, or bits would depend on the version of Triton, whose default changes
    sizes = {"PIECE": PIECE, "ENTRIES": tile.entries, "COLUMNS": tile.columns, "enable_fp_fusion": True}
    columns = triton.cdiv(d, tile.columns)
    with torch.cuda.device_of(table):
        if len(pieces):
            sum_pieces[len(pieces), columns](pieces, *given, **sizes)
        sum_segments[segments, columns](out, pieces, *given, **sizes)
    return out


def dots(
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "columns d"],
    row: Int[Tensor, " entries"],
    column: Int[Tensor, " entries"],
) -> Float[Tensor, " entries"]:
    """`a[row[e]] . b[column[e]]` for every entry e; fastest where neighbours share a row.

    Summed in float32 (float64 of float64) whatever the rows are kept in, and rounded once.
    """
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    a, b, row, column = (each.contiguous() for each in (a, b, row, column))
    out, entries, d = a.new_empty(len(row)), len(row), a.shape[1]
    if entries:
        exact = summed_in(a.dtype)
        tile = tile_of(d, exact)
        sizes = {"ENTRIES": tile.entries, "COLUMNS": tile.columns, "enable_fp_fusion": True}
        with torch.cuda.device_of(a):
            programs = triton.cdiv(entries, tile.entries)
            dot_rows[(programs,)](out, a, b, row, column, entries, d, EXACT=_IN_TRITON[exact], **sizes)
    return out


def summed_in(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums over rows of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_of(d: int, exact: torch.dtype) -> Tile:
    """The tile of programs over rows of length d, summed in this precision."""
    columns = min(triton.next_power_of_2(max(d, 1)), _WIDEST)
    return Tile(min(_BYTES // (exact.itemsize * columns), PIECE), columns)


@triton.jit(do_not_specialize=["n_entries", "n_segments"])
def sum_pieces(
    pieces: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    starts: tl.tensor,
    n_entries: tl.tensor,
    n_segments: tl.tensor,
    d: tl.tensor,
    PIECE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum the pieces, each of PIECE entries, that lie within one segment; nothing is written for the others."""
    piece = tl.program_id(0).to(tl.int64)
    begin = piece * PIECE
    segment, within = begin * 0, begin * 0 + n_segments  # the last that begins here or before, and where it may be
    while within > 1:
        step = tl.cdiv(within, _WAYS)
        at = segment + tl.arange(0, _WAYS) * step
        begun = tl.load(starts + at, mask=at < n_segments, other=n_entries) <= begin
        segment += (tl.sum(begun.to(tl.int64), 0) - 1) * step
        within = step
    end = tl.load(starts + segment + 1, mask=segment + 1 < n_segments, other=n_entries)
    if end >= begin + PIECE:
        column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros([ENTRIES, COLUMNS], dtype=pieces.dtype.element_ty)
        for first in range(0, PIECE, ENTRIES):
            entry = begin + first + tl.arange(0, ENTRIES)
            total = add_weighted(total, table, index, weight, entry, entry < n_entries, column, d)
        tl.store(pieces + piece * d + column, tl.sum(total, 0), mask=column < d)


@triton.jit(do_not_specialize=["n_entries", "n_segments"])
def sum_segments(
    out: tl.tensor,
    pieces: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    starts: tl.tensor,
    n_entries: tl.tensor,
    n_segments: tl.tensor,
    d: tl.tensor,
    PIECE: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum each segment: the entries before its first whole piece and after its last one, and these pieces' sums."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(starts + segment).to(tl.int64)
    end = tl.load(starts + segment + 1, mask=segment + 1 < n_segments, other=n_entries).to(tl.int64)
    first_piece, last_piece = tl.cdiv(begin, PIECE), end // PIECE
    in_pieces = tl.maximum(last_piece - first_piece, 0) * PIECE
    before = first_piece * PIECE - begin
    total = tl.zeros([ENTRIES, COLUMNS], dtype=pieces.dtype.element_ty)
    for first in range(0, end - begin - in_pieces, ENTRIES):
        place = first + tl.arange(0, ENTRIES)
        entry = begin + place + tl.where(place < before, 0, in_pieces)
        total = add_weighted(total, table, index, weight, entry, entry < end, column, d)
    for first in range(first_piece, last_piece, ENTRIES):
        piece = first + tl.arange(0, ENTRIES)
        real = (piece < last_piece)[:, None] & (column < d)[None, :]
        total += tl.load(pieces + piece[:, None] * d + column[None, :], mask=real, other=0.0)
    summed = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + segment * d + column, summed, mask=column < d)


@triton.jit
def add_weighted(
    total: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    weight: tl.tensor,
    entry: tl.tensor,
    real: tl.tensor,
    column: tl.tensor,
    d: tl.tensor,
) -> tl.tensor:
    """`total` and, where real, the entries' weighted rows; in the precision of `total`."""
    row = tl.load(index + entry, mask=real, other=0).to(tl.int64)
    factor = tl.load(weight + entry, mask=real, other=0.0).to(total.dtype)
    there = real[:, None] & (column < d)[None, :]
    rows = tl.load(table + row[:, None] * d + column[None, :], mask=there, other=0.0)
    return total + factor[:, None] * rows.to(total.dtype)


@triton.jit(do_not_specialize=["n_entries"])
def dot_rows(
    out: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n_entries: tl.tensor,
    d: tl.tensor,
    EXACT: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Multiply pairs of rows, ENTRIES of them a program, COLUMNS of their coordinates at a time."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    real = entry < n_entries
    of_a = a + tl.load(row + entry, mask=real, other=0).to(tl.int64)[:, None] * d
    of_b = b + tl.load(column + entry, mask=real, other=0).to(tl.int64)[:, None] * d
    total = tl.zeros([ENTRIES, COLUMNS], dtype=EXACT)
    for first in range(0, d, COLUMNS):
        at = first + tl.arange(0, COLUMNS)[None, :]
        there = real[:, None] & (at < d)
        left = tl.load(of_a + at, mask=there, other=0.0).to(EXACT)
        total += left * tl.load(of_b + at, mask=there, other=0.0).to(EXACT)
    tl.store(out + entry, tl.sum(total, 1).to(out.dtype.element_ty), mask=real)
