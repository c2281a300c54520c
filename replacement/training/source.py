"""Where activations come from, and how they are shuffled in bounded memory.

A source is asked for its n-th batch, so that a stopped run goes on exactly where it was. Knows nothing of models:
whoever has one writes a source.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.errors import InputError


class Activations(NamedTuple):
    """Inputs and outputs of every layer's MLP at the same tokens."""

    inputs: Float[Tensor, "layers tokens d_in"]
    outputs: Float[Tensor, "layers tokens d_out"]


class ActivationSource(Protocol):
    """Random access to batches of activations, all of one size."""

    tokens: int  #: tokens of every batch

    def batch(self, index: int) -> Activations:
        """The batch of this number, the same whenever it is asked for."""
        ...


class ShuffledBlocks:
    """Batches of one size drawn without replacement from blocks of several source batches.

    Batch n is a function of the source, the sizes and the seed alone, and costs one block. Memory: one block.
    """

    def __init__(self, source: ActivationSource, *, block_batches: int, batch_tokens: int, seed: int) -> None:
        self.source, self.block_batches, self.batch_tokens, self.seed = source, block_batches, batch_tokens, seed
        self.batches = block_batches * source.tokens // batch_tokens  #: shuffled batches of one block
        if self.batches < 1:
            raise InputError(
                f"ShuffledBlocks(batch_tokens={batch_tokens}): {block_batches} batches of {source.tokens} tokens each "
                "do not fill one batch; raise block_batches"
            )
        self._block, self._content = -1, Activations(torch.empty(0), torch.empty(0))

    def batch(self, index: int) -> Activations:
        """The index-th shuffled batch; cheap when asked for in ascending order."""
        block, place = divmod(index, self.batches)
        if block != self._block:
            self._content, self._block = self._load(block), block
        piece = slice(place * self.batch_tokens, (place + 1) * self.batch_tokens)
        return Activations(self._content.inputs[:, piece], self._content.outputs[:, piece])

    def first_tokens(self, n: int) -> Activations:
        """Up to n tokens of the first block."""
        self.batch(0)
        return Activations(self._content.inputs[:, :n], self._content.outputs[:, :n])

    def _load(self, block: int) -> Activations:
        parts = [self.source.batch(block * self.block_batches + i) for i in range(self.block_batches)]
        inputs, outputs = torch.cat([part.inputs for part in parts], 1), torch.cat([part.outputs for part in parts], 1)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
        order = torch.randperm(inputs.shape[1], generator=generator)
        return Activations(inputs[:, order], outputs[:, order])
