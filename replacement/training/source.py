"""Where activations come from, and how they are shuffled in bounded memory.

A source is asked for its n-th batch, so that a stopped run goes on exactly where it was. Knows nothing of models:
whoever has one writes a source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.errors import InputError

Activations = Mapping[str, Float[Tensor, "tokens width"]]
"""Full hook name -> activations of the same tokens."""


class ActivationSource(Protocol):
    """Random access to batches of activations."""

    sites: tuple[str, ...]  #: full hook names

    def batch(self, index: int) -> Activations:
        """The batch of this number, the same whenever it is asked for; batches may differ in size."""
        ...


class Position(NamedTuple):
    """How far a stream has been read."""

    block: int = 0
    place: int = 0  #: batches of the block that have been served


class Stream:
    """Batches of one size, drawn without replacement from a shuffled buffer of many source batches.

    The buffer holds as many source batches as fit `buffer_bytes` (at least one), is shuffled across all their
    sequences, and is read to its end before the next one is loaded; what does not fill a batch is left out. What comes
    next is a function of source, sizes, seed and position.
    """

    def __init__(self, source: ActivationSource, *, buffer_bytes: int, batch_tokens: int, seed: int) -> None:
        self.source, self.batch_tokens, self.seed = source, batch_tokens, seed
        first = source.batch(0)
        size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
        self.block_batches = max(1, buffer_bytes // max(1, size))  #: source batches of one buffer
        self.position = Position()
        self._loaded = -1
        self._content: dict[str, Tensor] = {}
        self._order = torch.empty(0, dtype=torch.long)

    def next(self) -> dict[str, Float[Tensor, "batch_tokens width"]]:
        """The next batch."""
        batch = self.peek()
        self.position = self.position._replace(place=self.position.place + 1)
        return batch

    def peek(self) -> dict[str, Float[Tensor, "batch_tokens width"]]:
        """The next batch, without moving on."""
        self._load(self.position.block)
        if (self.position.place + 1) * self.batch_tokens > len(self._order):
            self.position = Position(self.position.block + 1)
            self._load(self.position.block)
        start = self.position.place * self.batch_tokens
        rows = self._order[start : start + self.batch_tokens]
        return {name: tensor[rows] for name, tensor in self._content.items()}

    def sample(self, tokens: int) -> dict[str, Float[Tensor, "tokens width"]]:
        """Up to so many tokens of the first buffer."""
        self._load(0)
        rows = self._order[:tokens]
        return {name: tensor[rows] for name, tensor in self._content.items()}

    def _load(self, block: int) -> None:
        if block == self._loaded:
            return
        self._content = {}
        parts = [self.source.batch(block * self.block_batches + i) for i in range(self.block_batches)]
        self._content = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        tokens = len(next(iter(self._content.values())))
        if tokens < self.batch_tokens:
            raise InputError(
                f"Stream(batch_tokens={self.batch_tokens}): the buffer holds {tokens} tokens of activations; "
                "raise buffer_bytes or lower batch_tokens"
            )
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        self._order, self._loaded = torch.randperm(tokens, generator=generator), block
