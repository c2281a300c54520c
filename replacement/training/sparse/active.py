"""Which features are active at which tokens, and how to read that off a matrix of bfloat16 pre-activations.

Knows nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Int, Int16
from torch import Tensor

_FOLD = 8  # columns whose comparisons share one 16-bit integer
_WORD = 4  # 16-bit integers in one 64-bit word


class ByFeature(NamedTuple):
    """The entries of an `ActiveSet` in the order of their features, as sums over a feature's tokens need them."""

    order: Int[Tensor, " entries"]  #: place of each in the set
    token: Int[Tensor, " entries"]
    starts: Int[Tensor, " n_features"]  #: where each feature's entries begin


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """Which features fire at which tokens: one entry each, ordered by token, then by feature."""

    token: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    n_tokens: int
    n_features: int

    @cached_property
    def starts(self) -> Int[Tensor, " n_tokens"]:
        """Where each token's entries begin."""
        return segment_starts(self.token, self.n_tokens)

    @cached_property
    def by_feature(self) -> ByFeature:
        """The same entries feature by feature, and token by token within one; sorted once for all that asks."""
        narrow = torch.int16 if self.n_features <= 1 << 15 else torch.int32  # short keys sort faster
        order = self.feature.to(narrow).sort(stable=True).indices
        return ByFeature(order, self.token.index_select(0, order), segment_starts(self.feature, self.n_features))


def segment_starts(segment: Int[Tensor, " entries"], n_segments: int) -> Int[Tensor, " n_segments"]:
    """Where each segment begins once the entries are in the order of their segments."""
    counts = torch.bincount(segment, minlength=n_segments)
    return counts.cumsum(0) - counts


def as_bits(pre: BFloat16[Tensor, "tokens n_features"]) -> Int16[Tensor, "tokens n_features"]:
    """The same memory as integers, which order as the floats do where those are positive and stay below 0 elsewhere."""
    return pre.view(torch.int16)


def select(pre: BFloat16[Tensor, "tokens n_features"], threshold: float = 1.0) -> ActiveSet:
    """The entries of `pre` (bfloat16, from `preselect`) above a positive threshold."""
    assert pre.dtype == torch.bfloat16
    rows = max(1, (1 << 20) // pre.shape[1])
    levels = level_above(threshold, rows, pre.device)
    pieces = as_bits(pre.contiguous()).split(rows)
    places = [at_least(piece, levels[: len(piece)]) + i * rows * pre.shape[1] for i, piece in enumerate(pieces)]
    return active_at(in_order(places, pre.numel()), *pre.shape)


def level_above(threshold: float, rows: int, device: torch.device) -> Int16[Tensor, "rows 1"]:
    """What is above a positive threshold in bfloat16 is at least this, as an integer."""
    assert threshold > 0
    bits = torch.tensor(threshold, dtype=torch.bfloat16).view(torch.int16).item()
    return torch.full((rows, 1), bits + 1, dtype=torch.int16, device=device)


def active_at(flat: Int[Tensor, " entries"], n_tokens: int, n_features: int) -> ActiveSet:
    """The set of these places, ascending, in the flattened [n_tokens, n_features] matrix."""
    return ActiveSet(*split_places(flat, n_features), n_tokens, n_features)


def split_places(
    flat: Int[Tensor, " entries"], n_features: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"]]:
    """Tokens and features of places in the flattened matrix."""
    token = torch.div(flat, n_features, rounding_mode="floor")
    return token, flat - token * n_features


def in_order(parts: list[Int[Tensor, " _"]], size: int) -> Int[Tensor, " entries"]:
    """All places below `size`, ascending; short keys sort faster, and all at once faster than part by part."""
    flat = torch.cat(parts)
    return (flat.int() if size < 1 << 31 else flat).sort().values.long()


def at_least(bits: Int16[Tensor, "rows n_features"], level: Int16[Tensor, "rows 1"]) -> Int[Tensor, " entries"]:
    """Places in the flattened matrix, in any order, of what is `level` or more.

    Comparing into 16-bit integers is vectorised where comparing into bools is not. Eight blocks of columns share one
    integer and four of these one word, so that what does not fire is skipped 32 at a time.
    """
    rows, n_features = bits.shape
    if n_features % (_FOLD * _WORD) or bits.device.type != "cpu":
        return (bits >= level).flatten().nonzero().flatten()
    width = n_features // _FOLD
    blocks = bits.view(rows, _FOLD, width)
    folded = torch.empty(rows, width, dtype=torch.int16)
    torch.ge(blocks[:, 0], level, out=folded)
    one = torch.empty_like(folded)
    for block in range(1, _FOLD):
        folded.add_(torch.ge(blocks[:, block], level, out=one), alpha=1 << block)
    words = folded.view(torch.int64).flatten()
    word = words.nonzero().flatten()
    left, found, per_row = words.index_select(0, word), [], width // _WORD
    row = torch.div(word, per_row, rounding_mode="floor")
    place = word * _WORD + row * (n_features - width)  # of the first column that a word stands for
    while len(left):
        lowest = left & -left
        bit = lowest.double().frexp().exponent.long() - 1  # 16 for each integer of the word, the block in the lower 8
        found.append(place + (bit >> 4) + (bit & 15) * width)
        left = left ^ lowest
        rest = left.nonzero().flatten()
        left, place = left.index_select(0, rest), place.index_select(0, rest)
    return torch.cat([place, *found])
