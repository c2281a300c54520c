"""Which features are active at which tokens.

Knows nothing of weights, or of how they were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.training.sparse.search import ascending, divided


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
    pre: Float[Tensor, " entries"] | None = None
    """Pre-activations as `products.dots` gives them, where the choice took them: of its inputs and weights."""

    @cached_property
    def starts(self) -> Int[Tensor, " n_tokens"]:
        """Where each token's entries begin."""
        return segment_starts(self.token, self.n_tokens)

    @cached_property
    def by_feature(self) -> ByFeature:
        """The same entries feature by feature, and token by token within one; sorted once for all that asks."""
        order = self.feature.to(narrowest(self.n_features)).sort(stable=True).indices
        return ByFeature(order, self.token.index_select(0, order), segment_starts(self.feature, self.n_features))


def segment_starts(segment: Int[Tensor, " entries"], n_segments: int) -> Int[Tensor, " n_segments"]:
    """Where each segment begins once the entries are in the order of their segments."""
    counts = torch.bincount(segment, minlength=n_segments)
    return counts.cumsum(0) - counts


def active_at(flat: Int[Tensor, " entries"], n_tokens: int, n_features: int) -> ActiveSet:
    """The set of these places, ascending, in the flattened [n_tokens, n_features] matrix."""
    token, feature = divided(flat, n_features, size=n_tokens * n_features)
    return ActiveSet(token, feature, n_tokens, n_features)


def in_order(parts: list[Int[Tensor, " _"]], size: int) -> Int[Tensor, " entries"]:
    """All places below `size`, ascending; sorted all at once, which is faster than part by part."""
    return ascending(torch.cat(parts).to(narrowest(size)))


def narrowest(size: int) -> torch.dtype:
    """The integers that hold all places below `size` and sort fastest."""
    return torch.int16 if size <= 1 << 15 else torch.int32 if size <= 1 << 31 else torch.int64
