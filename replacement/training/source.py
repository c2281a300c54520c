"""Where activations come from, and how they are shuffled in bounded memory.

A source is asked for its n-th batch, so that a stopped run goes on exactly where it was. Knows nothing of models:
whoever has one writes a source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.errors import InputError
from replacement.training.exchange import Exchange
from replacement.training.parallel import ALONE, Mesh

Activations = Mapping[str, Float[Tensor, "tokens width"]]
"""Full hook name -> activations of the same tokens."""


class ActivationSource(Protocol):
    """Random access to batches of activations."""

    sites: tuple[str, ...]  #: full hook names

    def batch(self, index: int) -> Activations:
        """The batch of this number, the same whenever it is asked for, and left as it is until another one is asked
        for; batches may differ in size."""
        ...


class Position(NamedTuple):
    """How far a stream has been read."""

    block: int = 0
    place: int = 0  #: batches of the block that have been served


SPARE = 1.1
"""Tokens that a buffer holds of those that a whole run reads, where it could hold more: batches differ in size."""
_LONGER = 9 / 8
"""A source batch may have so many times the tokens of the first; what it has beyond is left out."""


class Block(NamedTuple):
    """What one buffer holds."""

    batches: int  #: of the source
    most: int  #: tokens of any of them

    def tokens(self, sizes: Iterable[int]) -> int:
        """Tokens that are held of batches of these sizes."""
        return sum(min(size, self.most) for size in sizes)


def block_of(buffer_bytes: int, first: Activations, *, tokens: int | None = None) -> Block:
    """How many source batches one buffer holds, counted by the size of the first of them.

    tokens: that will be read; no more than these are harvested at once.
    """
    usual = max(1, len(next(iter(first.values()))))
    width = sum(tensor.numel() * tensor.element_size() for tensor in first.values()) // usual
    room = buffer_bytes // max(1, width)
    fit = max(1, room // usual)
    batches = fit if tokens is None else min(fit, math.ceil(SPARE * tokens / usual))
    return Block(batches, max(usual, min(room // batches, int(_LONGER * usual))))


class Stream:
    """Batches of one size, drawn without replacement from a shuffled buffer of many source batches.

    The buffer holds as many source batches as fit `buffer_bytes` (at least one, and no more than hold the `tokens` that
    will be read), is shuffled across all their sequences, and is read to its end before the next one is loaded; what
    does not fill a batch is left out, and so is what would not fit: the last tokens of a source batch that is longer
    than the first. Batches are copied into it as they come; one that is all it holds is not. What comes next is a
    function of source, sizes, seed and position.

    Several processes harvest a buffer together, each its share of the source's batches, hold it together, each the
    tokens that it sees, and are served their shares of the batches that one process would be served.
    """

    def __init__(
        self,
        source: ActivationSource,
        *,
        buffer_bytes: int,
        batch_tokens: int,
        seed: int,
        tokens: int | None = None,
        mesh: Mesh = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        """The buffer is in the host's memory; batches are served on `device`."""
        if batch_tokens % mesh.data.size:
            raise InputError(
                f"Stream(batch_tokens={batch_tokens}): {mesh.data.size} processes share a batch; pass a multiple"
            )
        self.source, self.batch_tokens, self.seed, self.mesh, self.device = source, batch_tokens, seed, mesh, device
        first = source.batch(0)
        self._like = {name: tensor[:0].cpu() for name, tensor in first.items()}
        self.block = block_of(buffer_bytes, first, tokens=tokens)  #: what one buffer holds
        self.position = Position()
        self._loaded = -1
        self._content: dict[str, Tensor] = {}
        self._order = torch.empty(0, dtype=torch.long)
        self._tokens = 0

    def next(self) -> dict[str, Float[Tensor, "share width"]]:
        """The next batch, in memory of its own: of its `batch_tokens` tokens those that this process
        sees."""
        batch = self.peek()
        self.position = self.position._replace(place=self.position.place + 1)
        return batch

    def peek(self) -> dict[str, Float[Tensor, "share width"]]:
        """The next batch, without moving on."""
        self._load(self.position.block)
        if (self.position.place + 1) * self.batch_tokens > self._tokens:
            self.position = Position(self.position.block + 1)
            self._load(self.position.block)
        share = self.batch_tokens // self.mesh.data.size
        start = self.position.place * share
        rows = self._order[start : start + share]
        return {name: tensor.index_select(0, rows).to(self.device) for name, tensor in self._content.items()}

    def sample(self, tokens: int) -> dict[str, Float[Tensor, "tokens width"]]:
        """Up to so many tokens of the first buffer, the same in all processes."""
        self._load(0)
        first = torch.arange(min(tokens, self._tokens))
        if self.mesh.data.size == 1:
            first = self._order[first]
        return {name: self.mesh.data.fetched(tensor, first).to(self.device) for name, tensor in self._content.items()}

    def _load(self, block: int) -> None:
        if block == self._loaded:
            return
        self._content = {}  # before anything of the next one is there
        world = self.mesh.world
        n_batches = self.block.batches
        sizes = torch.zeros(n_batches, dtype=torch.long)
        own = range(world.place, n_batches, world.size)
        self._content, sizes[own.start :: own.step] = self._read([block * n_batches + i for i in own])
        sizes = world.total(sizes)
        self._tokens = int(sizes.sum())
        if self._tokens < self.batch_tokens:
            raise InputError(
                f"Stream(batch_tokens={self.batch_tokens}): the buffer holds {self._tokens} tokens of activations; "
                "raise buffer_bytes or lower batch_tokens"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        self._order, self._loaded = torch.randperm(self._tokens, generator=generator), block
        if world.size > 1:
            holder = torch.arange(n_batches).repeat_interleave(sizes) % world.size
            exchange = Exchange(holder, self._order, self.mesh)
            for name in self._content:  # one site's old tokens and new at a time
                self._content[name] = exchange(self._content[name])
            self._order = torch.arange(len(next(iter(self._content.values()))))

    def _read(self, numbers: list[int]) -> tuple[dict[str, Tensor], Int[Tensor, " batches"]]:
        """The source's batches of these numbers, one after another, and how many tokens of each are held."""
        most, sizes = self.block.most, torch.zeros(len(numbers), dtype=torch.long)
        if len(numbers) == 1:
            batch = self.source.batch(numbers[0])
            content = {name: _alone(batch[name][:most].to(like)) for name, like in self._like.items()}
            sizes[0] = len(next(iter(content.values())))
            return content, sizes
        pool = {name: like.new_empty(len(numbers) * most, *like.shape[1:]) for name, like in self._like.items()}
        filled = 0
        for place, number in enumerate(numbers):
            batch = self.source.batch(number)
            sizes[place] = min(most, len(next(iter(batch.values()))))
            end = filled + int(sizes[place])
            for name, rows in pool.items():
                rows[filled:end].copy_(batch[name][:most])
            filled = end
        return {name: rows[:filled] for name, rows in pool.items()}, sizes


def _alone(rows: Tensor) -> Tensor:
    """The same rows, copied only where their memory holds more than them."""
    return rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()
