"""Which rows are computed, in which order and batches, and what is kept of each.

The engine (`replacement.contributions`) computes rows, `circuits.targets` says what the first ones are, and
`circuits.selection` which features come next when not all are traced. Knows nothing of nodes or graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_array

from circuits.rows import Block, chosen_drop, store
from circuits.selection import partial_influence, strongest
from circuits.targets import Target, depth, reads
from replacement.contributions import Contributions, Engine, total_rows
from replacement.errors import InputError
from replacement.features import Targets
from replacement.local import LocalModel

SWEEP_BYTES = 256 * 2**20  #: what one sweep's working arrays may take

Progress = Callable[[int, int], None]


class Tracer:
    """Computes rows, targets first, and keeps them sparse; columns are features, errors, embeddings in that order."""

    def __init__(
        self, local: LocalModel, engine: Engine, targets: list[Target], batch_size: int, progress: Progress | None
    ) -> None:
        self.local, self.engine, self.targets, self.progress = local, engine, targets, progress
        self.depths = np.array([depth(local, target) for target in targets])
        self.depth = local.features.depth.cpu().numpy()
        self.reachable = int((self.depth < self.depths.max()).sum())  # features are sorted by depth
        self.n_sources = len(self.depth) + (len(local.slots) + 1) * local.n_positions
        self.batch_size = min(batch_size, _sweep_batch(local))
        self.blocks: list[Block] = []
        self.drop = 0.0

    @property
    def order(self) -> Int[np.ndarray, " n"]:
        """The features that have a row, in the order of the rows."""
        return np.concatenate([np.empty(0, int), *(block.index for block in self.blocks if not block.of_targets)])

    @property
    def dropped_share(self) -> float:
        """The largest share of a row that was dropped."""
        return max((block.share for block in self.blocks), default=0.0)

    def chosen_drop(self, drop: float | None, wanted: int) -> float:
        """The bound on what rows drop, the default one where None is asked for."""
        return chosen_drop(drop, n_rows=len(self.targets) + wanted, n_sources=self.n_sources)

    def run(self, max_features: int | None, update_every: int, drop: float | None) -> None:
        """Rows of all targets, then of features until there are `max_features`."""
        wanted = self.wanted(max_features)
        self.drop = self.chosen_drop(drop, wanted)
        self.trace_targets()
        done = 0
        while done < wanted:
            room = min(update_every, wanted - done)
            chosen = np.arange(self.reachable) if wanted == self.reachable else self.rank(room)
            for batch in self.batches(np.sort(chosen)):
                self.trace(batch)
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, wanted)

    def wanted(self, max_features: int | None) -> int:
        """How many features get a row."""
        return self.reachable if max_features is None else min(max_features, self.reachable)

    def trace(self, features: Int[np.ndarray, " batch"]) -> None:
        """Rows of features of one depth."""
        index = torch.from_numpy(features).to(self.local.forward.tokens)
        self._add(int(self.depth[features[0]]), features, self.local.feature_targets(index), of_targets=False)

    def trace_targets(self) -> None:
        """Rows of all targets."""
        for at in np.unique(self.depths).tolist():
            index = np.flatnonzero(self.depths == at)
            for start in range(0, len(index), self.batch_size):
                part = index[start : start + self.batch_size]
                self._add(at, part, reads(self.local, [self.targets[i] for i in part]), of_targets=True)

    def rank(self, count: int) -> Int[np.ndarray, " n"]:
        """`count` features without a row, most influential first, by the rows known so far."""
        weights = np.array([target.weight for target in self.targets])
        influence = partial_influence(self.blocks, weights, self.n_sources)
        return strongest(influence[: self.reachable], self.order, count)

    def batches(self, features: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " batch"]]:
        """Batches of one depth each, in the features' order (depth, position), so that prefixes stay short."""
        depths = self.depth[features]
        for at in np.unique(depths):
            alike = features[depths == at]
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]

    def _add(self, at: int, index: Int[np.ndarray, " n"], asked: Sequence[Targets], *, of_targets: bool) -> None:
        """Compute rows of one depth and keep them."""
        self.blocks.append(self._kept(at, index, total_rows(self.engine, asked), of_targets=of_targets))

    def _kept(self, at: int, index: Int[np.ndarray, " n"], result: Contributions, *, of_targets: bool) -> Block:
        below = int(np.searchsorted(self.depth, at))  # only these features can be sources: the rest are zeros
        dense = torch.cat([result.features[:, :below], result.errors.flatten(1), result.embeddings], 1)
        kept, sums, dropped, share = store(dense.cpu().numpy(), drop=self.drop)
        if not np.isfinite(sums).all():
            raise InputError(
                "attribute(...): rows hold NaN or infinity, needs finite weights; check the model, or use float32"
            )
        kept.indices[kept.indices >= below] += len(self.depth) - below
        rows = csr_array((kept.data, kept.indices, kept.indptr), shape=(len(index), self.n_sources))
        constants = torch.stack([result.bias, result.bos], 1).double().cpu().numpy()
        return Block(at, of_targets, index, rows, sums, np.column_stack([constants, dropped]), share)


def _sweep_batch(local: LocalModel) -> int:
    """How many targets one sweep can carry within SWEEP_BYTES."""
    return max(1, SWEEP_BYTES // sweep_bytes(local))


def sweep_bytes(local: LocalModel) -> int:
    """What one target takes of a sweep's working arrays."""
    block = local.path.weights.blocks[0]
    heads = block.W_O.shape[0] * block.W_O.shape[1]
    hidden = max((mlp.c_in.shape[1] for mlp in local.path.mlps.values()), default=0)
    patterns = block.W_O.shape[0] * local.n_positions if local.path.attentions is not None else 0
    width = local.n_positions * (4 * local.forward.embedding.shape[1] + 3 * (heads + hidden + patterns))
    sources = len(local.features.layer) + (len(local.slots) + 1) * local.n_positions
    return (width + 2 * sources) * local.forward.embedding.element_size()
