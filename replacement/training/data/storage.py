"""How activations are kept in fewer bytes, and what that costs.

| name | a number takes | scale |
| --- | --- | --- |
| `float32` | 4 bytes | |
| `bfloat16` | 2 bytes | |
| `int8_token` | 1 byte | one float32 for each token |
| `int8_channel` | 1 byte | one float32 for each channel of a batch |

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from replacement.errors import InputError
from replacement.training.source import Activations, ActivationSource

DTYPES = ("bfloat16", "float32", "int8_token", "int8_channel")
_STEPS = 127


class Stored(NamedTuple):
    """One batch at one site, as it is kept."""

    values: Shaped[Tensor, "tokens width"]
    scale: Float[Tensor, "rows columns"] | None  #: [tokens, 1] or [1, width]


class SiteCost(NamedTuple):
    """What keeping a site's activations in fewer bytes costs."""

    site: str
    fvu: float  #: `sum |x - stored x|^2 / sum |x - mean x|^2`: what is lost before any dictionary is
    bytes_per_token: float


def encode(x: Float[Tensor, "tokens width"], dtype: str) -> Stored:
    """`q = round(x / s)`, `s = max |x| / 127` over a token or over a channel of the batch; or a plain cast."""
    if dtype in ("float32", "bfloat16"):
        return Stored(x.to(getattr(torch, dtype)).contiguous(), None)
    wide = x.float()
    scale = wide.abs().amax(1 if dtype == "int8_token" else 0, keepdim=True) / _STEPS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Stored((wide / divisor).round().clamp(-_STEPS, _STEPS).to(torch.int8), scale)


def decode(stored: Stored, dtype: torch.dtype) -> Float[Tensor, "tokens width"]:
    """`x = q s`."""
    return stored.values.to(dtype) if stored.scale is None else (stored.values.float() * stored.scale).to(dtype)


def require_dtype(dtype: str, call: str) -> None:
    """Raise `InputError` for a name that is not in the table."""
    if dtype not in DTYPES:
        raise InputError(f"{call}(dtype={dtype!r}): needs one of {', '.join(DTYPES)}")


def storage_cost(source: ActivationSource, *, dtype: str, batches: int = 4) -> list[SiteCost]:
    """What storing the source's activations as `dtype` costs at each site, over the first `batches` batches: `Costs`.

    Raises `InputError` for an unknown dtype.
    """
    require_dtype(dtype, "storage_cost")
    if batches < 1:
        raise InputError(f"storage_cost(batches={batches}): needs at least 1")
    costs = Costs()
    for index in range(batches):
        batch = source.batch(index)
        costs.add(batch, {site: encode(x, dtype) for site, x in batch.items()})
    return costs.result()


class Costs:
    """What storing activations in fewer bytes costs at each site, against float32, batch by batch.

    `FVU = sum |x - stored x|^2 / sum |x - mean x|^2`, summed in float64. It is the floor of every dictionary's FVU on
    the stored activations.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, batch: Activations, stored: Mapping[str, Stored]) -> None:
        """Take one batch, and how it is kept."""
        for site, kept in stored.items():
            wide = batch[site].double().cpu()
            size = kept.values.nbytes + (0 if kept.scale is None else kept.scale.nbytes)
            error = (wide - decode(kept, torch.float32).double().cpu()).square().sum()
            new = [error, wide.square().sum(), wide.sum(0), torch.tensor(len(wide)), torch.tensor(size)]
            old = self._sums.get(site)
            self._sums[site] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def result(self) -> list[SiteCost]:
        """The cost at each site."""
        costs = []
        for site, (error, square, total, tokens, nbytes) in self._sums.items():
            variance = float(square - total.square().sum() / tokens)
            costs.append(SiteCost(site, float(error) / variance if variance > 0 else 0.0, float(nbytes / tokens)))
        return costs
