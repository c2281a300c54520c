"""How many sources each row of a prompt can have: what stands below it, up to its own position.

Counting only; knows the local model's table of features, nothing of how rows are computed.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Int

from replacement.local import LocalModel
from replacement.sites import Place


class Reach:
    """Counts of the features, errors and embeddings that features' rows can have as sources."""

    def __init__(self, local: LocalModel) -> None:
        self.local = local
        self.depth = local.features.depth.cpu().numpy()
        self.position = local.features.position.cpu().numpy()

    def sources(
        self, features: Int[np.ndarray, " n"], *, among: Int[np.ndarray, " n_chosen"] | None = None
    ) -> Int[np.ndarray, " n"]:
        """How many entries each feature's row can have; among: with no other features than these as sources."""
        depth, position = self.depth[features], self.position[features]
        below = self._below if among is None else self._count(among)
        return below[depth, position] + (position + 1) * (depth // len(Place) + 1)

    @cached_property
    def _below(self) -> Int[np.ndarray, "depth pos"]:
        """How many active features stand below a depth, up to a position."""
        return self._count(np.arange(len(self.position)))

    def _count(self, features: Int[np.ndarray, " n"]) -> Int[np.ndarray, "depth pos"]:
        count = np.zeros((int(self.depth.max(initial=0)) + 2, self.local.n_positions), dtype=np.int64)
        np.add.at(count, (self.depth[features] + 1, self.position[features]), 1)
        return count.cumsum(0).cumsum(1)
