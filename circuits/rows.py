"""Rows as a graph stores them: sparse, with the smallest edges left out up to a share of the row that is asked for.

Array work only; knows nothing of how rows are computed, nor of what their columns are.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import DTypeLike
from scipy.sparse import csr_array

from replacement.errors import InputError

WHOLE_ENTRIES = 250_000_000  #: rows times sources up to which a graph keeps all of its edges, unless told otherwise
OWN_PAGES = 2**16  #: bytes from which on an array has memory of its own; a process may have some 10,000 such pieces
LARGE_DROP = 1e-3  #: share of a row that larger graphs leave out, unless told otherwise


class StoredRows(NamedTuple):
    """What is kept of some rows, and what is not."""

    kept: csr_array
    """[n_rows, n_sources] signed weights, of the rows' own dtype."""
    sums: Float[np.ndarray, " n_rows"]
    """Each row's sum of absolute weights that were kept, float64."""
    dropped: Float[np.ndarray, " n_rows"]
    """Signed sum of each row's edges that were left out, float64."""
    share: float
    """Largest share of a row's absolute sum that was left out, at most `drop`."""


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one depth, as they were computed."""

    depth: int
    of_targets: bool
    """Whether these are rows of targets, not of features."""
    index: Int[np.ndarray, " n_rows"]
    """Which target, or which active feature, each row belongs to."""
    rows: csr_array
    """[n_rows, n_sources] signed weights, column indices ascending."""
    sums: Float[np.ndarray, " n_rows"]
    """Each row's sum of absolute weights, float64."""
    constants: Float[np.ndarray, "n_rows 3"]
    """Each row's bias, what position 0 writes into it, and what was dropped of it."""
    share: float
    """Largest share of a row that was dropped."""

    @property
    def nbytes(self) -> int:
        """What the rows take."""
        return int(self.rows.data.nbytes + self.rows.indices.nbytes)


def store(rows: Float[np.ndarray, "n_rows n_sources"], *, drop: float) -> StoredRows:
    """Leave out the most edges of each row whose absolute values sum to at most `drop * sum_s |A[t, s]|`.

    They are the row's smallest, found by selection; edges as large as the smallest that stays stay too. `drop=0` keeps
    every edge that is not 0.
    """
    if drop == 0:
        return StoredRows(_sparse(rows), np.abs(rows).sum(1, dtype=np.float64), np.zeros(len(rows)), 0.0)
    indices, weights = [], []
    sums, dropped, share = np.zeros(len(rows)), np.zeros(len(rows)), 0.0
    for i, row in enumerate(rows):
        sources = np.flatnonzero(row)
        edges = row[sources]
        sizes = np.abs(edges)
        sums[i] = total = sizes.sum(dtype=np.float64)
        goes = _smallest(sizes, drop * total)
        if goes is not None:
            lost = sizes[goes].sum(dtype=np.float64)
            dropped[i] = edges[goes].sum(dtype=np.float64)
            sums[i], share = total - lost, max(share, float(lost / total))
            sources, edges = sources[~goes], edges[~goes]
        indices.append(sources.astype(np.int32))
        weights.append(edges)
    starts = np.cumsum([0, *map(len, weights)]).astype(np.int32)
    all_weights, all_indices = _pages(starts[-1], rows.dtype), _pages(starts[-1], np.int32)
    if len(rows):
        np.concatenate(weights, out=all_weights)
        np.concatenate(indices, out=all_indices)
    return StoredRows(csr_array((all_weights, all_indices, starts), shape=rows.shape), sums, dropped, share)


def _sparse(rows: Float[np.ndarray, "n_rows n_sources"]) -> csr_array:
    found, every = rows != 0, np.arange(rows.shape[1], dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(np.count_nonzero(found, 1))]).astype(np.int32)
    weights, indices = _pages(starts[-1], rows.dtype), _pages(starts[-1], np.int32)
    for row, where, start, end in zip(rows, found, starts[:-1], starts[1:], strict=True):
        np.compress(where, row, out=weights[start:end])
        np.compress(where, every, out=indices[start:end])
    return csr_array((weights, indices, starts), shape=rows.shape)


def _pages(count: int, dtype: DTypeLike) -> Shaped[np.ndarray, " count"]:
    """An array whose memory is the system's again once it is dropped: the allocator would keep it, and rows move from
    such arrays into the graph's while both are there.
    """
    size = int(count) * np.dtype(dtype).itemsize
    if size < OWN_PAGES:
        return np.empty(count, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype)


def _smallest(sizes: Float[np.ndarray, " n"], allowed: float) -> Bool[np.ndarray, " n"] | None:
    """Which are the smallest that sum to at most `allowed`, without those as large as one that stays; None for none.

    What goes is few: only sizes below a bound are sorted, a bound that grows until it holds more than may go.
    """
    if not 0 < allowed < np.inf:
        return None
    bound = float(4 * allowed / len(sizes))  # those below a quarter of this go in any case
    while True:
        few = sizes[sizes < bound].astype(np.float64)
        if len(few) == len(sizes) or few.sum() > allowed:
            break
        bound *= 4
    few.sort()
    within = int(np.searchsorted(np.cumsum(few), allowed, side="right"))
    goes = sizes < sizes.dtype.type(few[min(within, len(few) - 1)])
    return goes if goes.any() else None


def chosen_drop(drop: float | None, *, n_rows: int, n_sources: int) -> float:
    """Return `drop`, or for None: 0 up to WHOLE_ENTRIES rows times sources, LARGE_DROP beyond."""
    if drop is not None:
        return float(drop)
    return 0.0 if n_rows * n_sources <= WHOLE_ENTRIES else LARGE_DROP


def check_drop(drop: object) -> None:
    """Raise InputError unless `drop` is None or a share in [0, 1)."""
    if drop is None or (isinstance(drop, int | float) and not isinstance(drop, bool) and 0 <= drop < 1):
        return
    raise InputError(f"attribute(drop={drop!r}): must be in [0, 1); for 0.1 percent of every row pass 0.001")
