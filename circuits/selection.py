"""Which features to trace next when not all are: influence over the rows known so far. Array work only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from circuits.rows import Block

MIN_ROW_SUM = 1e-8  #: rows whose absolute weights sum to less are divided by this, as in the reference tool
PIECE = 2**18  #: entries taken at once, so that their copy in float64 stays in the processor's cache


def partial_influence(
    blocks: Sequence[Block], weights: Float[np.ndarray, " n_targets"], n_sources: int
) -> Float[np.ndarray, " n_sources"]:
    """Influence of every source on the targets along the rows known so far.

    A row only has sources of lower depth, so one sweep from the highest depth down is exact: `I = p (Â + Â² + ...)`
    with Â the row-normalised absolute rows. Each entry is read once, where it lies; nothing is stacked. weights: the
    targets' p.
    """
    influence = np.zeros(n_sources)
    for block in sorted(blocks, key=lambda block: -block.depth):
        gain = weights[block.index] if block.of_targets else influence[block.index]
        gain = gain / np.maximum(block.sums, MIN_ROW_SUM)
        for start, piece in _pieces(block.rows):
            influence += piece.T @ gain[start : start + piece.shape[0]]
    return influence


def _pieces(rows: csr_array) -> Iterator[tuple[int, csr_array]]:
    """The absolute values of a few rows at a time in float64, with the number of the first."""
    starts = rows.indptr
    first = 0
    while first < rows.shape[0]:
        end = int(np.searchsorted(starts, starts[first] + PIECE, side="right")) - 1
        end = min(max(end, first + 1), rows.shape[0])
        part = slice(starts[first], starts[end])
        absolute = np.abs(rows.data[part], dtype=np.float64)
        inside = (absolute, rows.indices[part], starts[first : end + 1] - starts[first])
        yield first, csr_array(inside, shape=(end - first, rows.shape[1]))
        first = end


def strongest(
    influence: Float[np.ndarray, " n_features"], known: Int[np.ndarray, " n_known"], count: int
) -> Int[np.ndarray, " n"]:
    """The `count` features of most influence among those not yet known, most influential first, ties in their order."""
    unknown = np.ones(len(influence), dtype=bool)
    unknown[known] = False
    candidates = np.flatnonzero(unknown)
    values = influence[candidates]
    if count == 0:
        return candidates[:0]
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above, level = np.flatnonzero(values > least), np.flatnonzero(values == least)
        picked = np.sort(np.concatenate([above, level[: count - len(above)]]))
        candidates, values = candidates[picked], values[picked]
    return candidates[np.argsort(-values, kind="stable")]
