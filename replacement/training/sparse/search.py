"""Sorting and searching many short numbers and flags; on a CPU by NumPy, several times as fast as torch there.

Among them the bits of bfloat16 numbers: those of positive ones order as the 16-bit integers they spell do, and integers
compare faster. Knows nothing of weights and features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import BFloat16, Bool, Float, Int, Int16, Shaped
from torch import Tensor

_NEVER = torch.iinfo(torch.int16).max
_INT32 = 1 << 31  # integers below it fit


def _by_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu"


def as_bits(pre: BFloat16[Tensor, "*shape"]) -> Int16[Tensor, "*shape"]:
    """The same memory as integers, which order as the floats do where those are positive and stay below 0 elsewhere."""
    return pre.view(torch.int16)


def level_above(thresholds: Float[Tensor, "*shape"]) -> Int16[Tensor, "*shape"]:
    """What is above a positive threshold in bfloat16 is at least this, as an integer."""
    return as_bits(thresholds.bfloat16()) + 1


def level_below(value: Float[Tensor, " tokens"]) -> Int16[Tensor, " tokens"]:
    """A positive number rounded down to bfloat16, as an integer; for the others one that nothing reaches."""
    exact = value.float().contiguous()
    if _by_numpy(exact):  # of few numbers, torch's calls take longer than what they do
        return torch.from_numpy(
            np.where(exact.numpy() > 0, exact.numpy().view(np.int32) >> 16, _NEVER).astype(np.int16)
        )
    bits = (exact.view(torch.int32) >> 16).to(torch.int16)
    return torch.where(exact > 0, bits, _NEVER).to(torch.int16)


def at_least(bits: Int16[Tensor, "rows columns"], level: Int16[Tensor, ...]) -> Int[Tensor, " found"]:
    """Places in the flattened matrix, ascending, of what is at its row's or column's level or above."""
    if not _by_numpy(bits):
        return places(bits >= level)
    return torch.from_numpy(np.flatnonzero(bits.numpy() >= level.numpy()))


def places(mask: Bool[Tensor, "*shape"]) -> Int[Tensor, " true"]:
    """Where the flattened mask is true, ascending."""
    if not _by_numpy(mask):
        return mask.flatten().nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def divided(integers: Int[Tensor, " n"], by: int, *, size: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Quotients and remainders of what is not negative and below `size`."""
    if not _by_numpy(integers):
        wide = integers.long()
        quotient = torch.div(wide, by, rounding_mode="floor")
        return quotient, wide - quotient * by
    narrow = (integers.int() if size <= _INT32 else integers).numpy()
    of_each = narrow // max(1, by)
    return torch.from_numpy(of_each).long(), torch.from_numpy(narrow - of_each * by).long()


def transposed(place: Int[Tensor, " n"], rows: int, columns: int, *, start: int = 0) -> Int[Tensor, " n"]:
    """Places in a flattened [rows, columns] matrix as those in its transpose, below `start` further rows."""
    if not _by_numpy(place):
        row, column = divided(place, columns, size=rows * columns)
        return (column + start) * rows + row
    narrow = np.int32 if rows * (columns + start) <= _INT32 else np.int64
    flat: npt.NDArray[np.signedinteger[Any]] = place.numpy().astype(narrow, copy=False)
    above = flat // max(1, columns)
    return torch.from_numpy((flat - above * columns + start) * rows + above)


def ascending(integers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The same integers, sorted."""
    if not _by_numpy(integers):
        return integers.sort().values
    return torch.from_numpy(np.sort(integers.numpy()))


def kth_largest(x: Shaped[Tensor, "rows n"], k: int) -> Shaped[Tensor, " rows"]:
    """The k-th largest number of each row."""
    if not _by_numpy(x):
        return x.topk(k, dim=1, sorted=False).values.amin(1)
    at = x.shape[1] - k
    return torch.from_numpy(np.partition(x.contiguous().numpy(), at, axis=1)[:, at])
