"""Rows as a graph stores them: sparse, with the smallest edges left out up to a share of the row that is asked for.

Array work only; knows nothing of how rows are computed, nor of what their columns are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array

from graphs.pruning import selection_threshold
from replacement.errors import InputError

WHOLE_ENTRIES = 50_000_000  #: rows times sources up to which a graph keeps all of its edges, unless told otherwise
LARGE_DROP = 1e-3  #: share of a row that larger graphs leave out, unless told otherwise


class StoredRows(NamedTuple):
    """What is kept of some rows, and what is not."""

    kept: csr_array
    """[n_rows, n_sources] signed weights, of the rows' own dtype."""
    dropped: Float[np.ndarray, " n_rows"]
    """Signed sum of each row's edges that were left out, float64."""
    share: float
    """Largest share of a row's absolute sum that was left out, at most `drop`."""


def store(rows: Float[np.ndarray, "n_rows n_sources"], *, drop: float) -> StoredRows:
    """Leave out the most edges of each row whose absolute values sum to at most `drop * sum_s |A[t, s]|`.

    They are the row's smallest, found by selection; edges as large as the smallest that stays stay too. `drop=0` keeps
    every edge that is not 0.
    """
    if drop == 0:
        return StoredRows(csr_array(rows), np.zeros(len(rows)), 0.0)
    indices, weights = [np.empty(0, np.int32)], [np.empty(0, rows.dtype)]
    dropped, share = np.zeros(len(rows)), 0.0
    for i, row in enumerate(rows):
        sources = np.flatnonzero(row)
        edges = row[sources]
        sizes = np.abs(edges.astype(np.float64))
        stays = sizes >= selection_threshold(sizes, 1 - drop)
        indices.append(sources[stays].astype(np.int32))
        weights.append(edges[stays])
        if not stays.all():
            dropped[i] = edges[~stays].sum(dtype=np.float64)
            share = max(share, float(sizes[~stays].sum() / sizes.sum()))
    starts = np.cumsum([len(part) for part in weights])
    parts = (np.concatenate(weights), np.concatenate(indices), starts)
    return StoredRows(csr_array(parts, shape=rows.shape), dropped, share)


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
