"""Where a matrix of bfloat16 pre-activations is above a level of its token, without looking at each place by itself.

The matrix is `[features, tokens]`: a product is fastest with the many rows first and a few tokens at a time. Bits of
positive floats order as the integers they spell do, and comparing those is vectorised. Knows nothing of weights.
"""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float, Int, Int16
from torch import Tensor

from replacement.training.sparse.active import in_order

_FOLD = 16  # comparisons that share one 16-bit integer
WORD = 4  # such integers in a 64-bit word, of neighbouring tokens
NEVER = torch.iinfo(torch.int16).max


def fold_of(n_features: int, device: torch.device) -> int:
    """Neighbouring features whose comparisons share an integer: rows `i`, `i + n_features / fold`, .. of the matrix."""
    if device.type != "cpu":
        return 1  # compares every place as fast
    fold = _FOLD
    while n_features % fold:
        fold //= 2
    return fold


def folded(rows: Tensor, fold: int) -> Tensor:
    """A view of what has one row a feature, in the order of the matrix: `[fold, n_features / fold, ..]`."""
    return rows.unflatten(0, (-1, fold)).transpose(0, 1)


def as_bits(pre: BFloat16[Tensor, "n_features tokens"]) -> Int16[Tensor, "n_features tokens"]:
    """The same memory as integers, which order as the floats do where those are positive and stay below 0 elsewhere."""
    return pre.view(torch.int16)


def level_above(threshold: float, tokens: int, device: torch.device) -> Int16[Tensor, " tokens"]:
    """What is above a positive threshold in bfloat16 is at least this, as an integer."""
    assert threshold > 0
    bits = torch.tensor(threshold, dtype=torch.bfloat16).view(torch.int16).item()
    return torch.full((tokens,), bits + 1, dtype=torch.int16, device=device)


def level_below(value: Float[Tensor, " tokens"]) -> Int16[Tensor, " tokens"]:
    """The next bfloat16 below a positive number as an integer; `NEVER`, which nothing reaches, for the others."""
    bits = (value.float().contiguous().view(torch.int32) >> 16).to(torch.int16)
    return torch.where(value > 0, bits, NEVER).to(torch.int16)


class Search:
    """Collects the places at or above their token's level, a few tokens at a time.

    Sixteen neighbouring features share one integer and four neighbouring tokens a word of these, so that what does not
    fire is skipped 64 at a time.
    """

    def __init__(self, n_features: int, fold: int, device: torch.device) -> None:
        self.n_features, self.fold = n_features, fold
        nothing = torch.empty(0, dtype=torch.long, device=device)
        self._words, self._first = [nothing], [nothing]  # those that are not zero, and the place of their first bit
        self._found = [nothing]

    def add(self, bits: Int16[Tensor, "n_features tokens"], level: Int16[Tensor, " tokens"], start: int) -> None:
        """Search the tokens from `start` on, a multiple of four of them, in rows of the order of `folded`."""
        if bits.device.type != "cpu":
            token, feature = (bits >= level).T.nonzero().unbind(1)
            self._found.append((token + start) * self.n_features + feature)
            return
        n_tokens = bits.shape[1]
        blocks = bits.view(self.fold, -1, n_tokens)
        found = torch.ge(blocks[0], level, out=torch.empty(blocks.shape[1:], dtype=torch.int16))
        one = torch.empty_like(found)
        for bit in range(1, self.fold):
            found.add_(torch.ge(blocks[bit], level, out=one), alpha=1 << bit if bit < 15 else -1 << 15)
        words = found.view(torch.int64).flatten()
        at = words.nonzero().flatten()
        row = torch.div(at, n_tokens // WORD, rounding_mode="floor")
        token = (at - row * (n_tokens // WORD)) * WORD + start
        self._first.append(token * self.n_features + row * self.fold)
        self._words.append(words.index_select(0, at))

    def found(self, n_tokens: int) -> Int[Tensor, " entries"]:
        """All that was found in the flattened [n_tokens, n_features] matrix, ascending."""
        found, left, first = self._found.copy(), torch.cat(self._words), torch.cat(self._first)
        while len(left):
            lowest = left & -left
            bit = (lowest.double().view(torch.int64) >> 52 & 2047) - 1023  # the exponent of a power of two
            found.append(first + (bit >> 4) * self.n_features + (bit & 15))
            left = left ^ lowest
            rest = left.nonzero().flatten()
            left, first = left.index_select(0, rest), first.index_select(0, rest)
        return in_order(found, n_tokens * self.n_features)
