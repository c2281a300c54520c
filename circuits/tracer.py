"""Which rows are computed, in which order and batches, and what is kept of each.

The engine (`replacement.contributions`) computes rows, `circuits.targets` says what the first ones are, and
`circuits.selection` which features come next when not all are traced. Knows nothing of nodes or graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from scipy.sparse import csr_array

from circuits.memory import Budget, in_words
from circuits.reach import Reach
from circuits.rows import Block, chosen_drop, store
from circuits.saved_rows import Identity, SavedRows
from circuits.selection import partial_influence, strongest
from circuits.targets import Target, depth, reads
from replacement.columns import COLUMNS, width
from replacement.contributions import Contributions, Engine, total_rows
from replacement.errors import InputError
from replacement.features import Targets
from replacement.local import LocalModel

CACHED_BYTES = 16 * 2**20  #: what a sweep takes at most where more would miss a processor's caches, and be slower
ENOUGH, MOST = 32, 64  #: targets of a sweep whose products are large, so that caches count; and the most it takes
SURE = 0.1  #: share of the rows' possible entries from which on it is said whether the rest fits
EMPTIER = 0.5  #: how full the rest is at least, beside those: rows of other layers lose more where edges are dropped

Progress = Callable[[int, int], None]


class Tracer:
    """Computes rows, targets first, and keeps them sparse; columns are features, errors, embeddings in that order."""

    def __init__(
        self,
        local: LocalModel,
        engine: Engine,
        targets: list[Target],
        batch_size: int,
        budget: Budget,
        progress: Progress | None,
    ) -> None:
        self.local, self.engine, self.targets, self.budget, self.progress = local, engine, targets, budget, progress
        self.depths = np.array([depth(local, target) for target in targets])
        self.depth = local.features.depth.cpu().numpy()
        self.reachable = int((self.depth < self.depths.max()).sum())  # features are sorted by depth
        self.n_sources = len(self.depth) + (len(local.slots) + 1) * local.n_positions
        self.batch_size = min(batch_size, _sweep_batch(local, budget))
        self.blocks: list[Block] = []
        self.drop = 0.0
        self.saved: SavedRows | None = None

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

    def save_in(self, saved: SavedRows, identity: Identity) -> None:
        """Keep rows on disk too, and go on from those that are there."""
        self.batch_size, self.saved = saved.begin(identity, self.batch_size), saved

    def run(self, max_features: int | None, update_every: int, drop: float | None) -> None:
        """Rows of all targets, then of features until there are `max_features`; InputError where they do not fit."""
        wanted = self.wanted(max_features)
        self.drop = self.chosen_drop(drop, wanted)
        self.trace_targets()
        done, fit = 0, _Fit(Reach(self.local), self.budget, wanted, self.reachable)
        while done < wanted:
            room = min(update_every, wanted - done)
            chosen = np.sort(np.arange(self.reachable) if wanted == self.reachable else self.rank(room))
            fit.plan(chosen)
            for batch in self.batches(chosen):
                self.trace(batch)
                fit.check(self.blocks[-1])
                done += len(batch)
                if self.progress is not None:
                    self.progress(done, wanted)

    def wanted(self, max_features: int | None) -> int:
        """How many features get a row."""
        return self.reachable if max_features is None else min(max_features, self.reachable)

    def trace(self, features: Int[np.ndarray, " batch"]) -> None:
        """Rows of features of one depth."""
        index = torch.from_numpy(features).to(self.local.forward.tokens)
        asked = partial(self.local.feature_targets, index)
        self._add(int(self.depth[features[0]]), features, asked, of_targets=False)

    def trace_targets(self) -> None:
        """Rows of all targets."""
        for at in np.unique(self.depths).tolist():
            index = np.flatnonzero(self.depths == at)
            for part in self._parts(index):
                asked = partial(reads, self.local, [self.targets[i] for i in part])
                self._add(at, part, asked, of_targets=True)

    def rank(self, count: int) -> Int[np.ndarray, " n"]:
        """`count` features without a row, most influential first, by the rows known so far."""
        weights = np.array([target.weight for target in self.targets])
        influence = partial_influence(self.blocks, weights, self.n_sources)
        return strongest(influence[: self.reachable], self.order, count)

    def batches(self, features: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " batch"]]:
        """Batches of one depth each, in the features' order (depth, position), so that prefixes stay short."""
        depths = self.depth[features]
        for at in np.unique(depths):
            yield from self._parts(features[depths == at])

    def finish(self) -> None:
        """No more rows are asked for: what the engine keeps from sweep to sweep makes way."""
        del self.engine

    def _parts(self, index: Int[np.ndarray, " n"]) -> Iterator[Int[np.ndarray, " batch"]]:
        """Batches of what is of one depth, an earlier run's as they were."""
        while len(index):
            size = (self.saved and self.saved.next_rows) or self.batch_size
            yield index[:size]
            index = index[size:]

    def _add(
        self, at: int, index: Int[np.ndarray, " n"], asked: Callable[[], Sequence[Targets]], *, of_targets: bool
    ) -> None:
        """Rows of one depth, those of an earlier run where it left them."""
        block = None if self.saved is None else self.saved.next(at, index, of_targets=of_targets)
        if block is not None:
            self.blocks.append(block)
            return
        self.blocks.append(self._kept(at, index, total_rows(self.engine, asked()), of_targets=of_targets))
        if self.saved is not None:
            self.saved.keep(self.blocks)

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


class _Fit:
    """Whether rows can fit in memory, told from those that are there; what only may be too much is let through."""

    def __init__(self, reach: Reach, budget: Budget, wanted: int, reachable: int) -> None:
        """wanted: how many of the first `reachable` features get a row."""
        self.reach, self.budget, self.wanted = reach, budget, wanted
        self.rest = reach.sources(np.arange(reachable))  # entries that rows can have, of features not chosen yet
        self.open = np.ones(reachable, dtype=bool)  # which those are
        self.possible = self.least = 0  # entries that rows chosen so far can have; that the others have at least
        self.done = self.taken = 0  # entries that finished rows could have, and the bytes that they take

    def plan(self, features: Int[np.ndarray, " n"]) -> None:
        """Say which features come next."""
        self.possible += int(self.rest[features].sum())
        self.open[features] = False
        missing, others = self.wanted - int((~self.open).sum()), self.rest[self.open]
        smallest = np.partition(others, missing - 1)[:missing] if missing else others[:0]
        self.least = int(smallest.sum())  # which features they will be is not known

    def check(self, block: Block) -> None:
        """Take note of rows; raises InputError where the rest, were it but half as full, will not fit."""
        self.done += int(self.reach.sources(block.index).sum())
        self.taken += block.nbytes
        full = self.taken / max(1, self.done) * EMPTIER
        expected = self.taken + full * (self.possible - self.done + self.least)
        sure = self.done > SURE * (self.possible + self.least) or self.taken > self.budget.rows
        if expected > self.budget.rows and sure:
            raise InputError(
                f"{self.budget.call}{self.wanted:,} rows take at least "
                f"{in_words(expected)}, and {in_words(self.budget.rows)} of it are for rows; pass a larger drop "
                "(--drop), a smaller max_features (--max-features) or more memory (--memory)"
            )


def _sweep_batch(local: LocalModel, budget: Budget) -> int:
    """How many targets one sweep can carry; raises InputError where there is no memory for one."""
    one = sweep_bytes(local)
    if one > budget.total:
        raise InputError(
            f"{budget.call}one row's sweep takes {in_words(one)}; "
            f"{'pass' if budget.given else 'free some, or pass'} more memory (--memory), or a shorter prompt"
        )
    size = max(1, min(MOST, max(ENOUGH, CACHED_BYTES // one), budget.sweep // one))
    size -= size % COLUMNS if size > COLUMNS else 0
    return max(targets for targets in range(1, size + 1) if width(targets) <= size)


def sweep_bytes(local: LocalModel) -> int:
    """What one target takes of a sweep's working arrays."""
    block, d_model = local.path.weights.blocks[0], local.forward.embedding.shape[1]
    heads, d_head, _ = block.W_O.shape
    hidden = max((mlp.c_in.shape[1] for mlp in local.path.mlps.values()), default=0)
    patterns = heads * local.n_positions if local.path.attentions is not None else 0
    a_position = d_model + (heads + len(block.W_V)) * d_head  # the stream, and what heads take and give
    a_position += 2 * d_model + 2 * hidden if hidden or local.path.skips else 0
    sources = len(local.features.layer) + (len(local.slots) + 1) * local.n_positions
    numbers = local.n_positions * (a_position + 3 * patterns) + heads * d_model + 3 * sources
    return numbers * local.forward.embedding.element_size()
