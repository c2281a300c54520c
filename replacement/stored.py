"""Products with encoder and decoder rows that stay in the precision of their files.

There may be more of them than memory in the precision that is computed in: they are converted some at a time, never
all. Knows nothing of dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CONVERTED_AT_ONCE = 1 << 22
"""Numbers that are converted together: 16 MiB in float32."""


def pre_activations(
    x: Float[Tensor, "... d_in"], W_enc: Float[Tensor, "rows d_in"], b_enc: Float[Tensor, " rows"]
) -> Float[Tensor, "... rows"]:
    """`x W_enc^T + b_enc` in the precision of x."""
    if W_enc.dtype == x.dtype:
        return F.linear(x, W_enc, b_enc)
    out = x.new_empty(*x.shape[:-1], len(W_enc))
    for rows in _pieces(W_enc):
        out[..., rows] = F.linear(x, W_enc[rows].to(x.dtype), b_enc[rows].to(x.dtype))
    return out


def written(
    activations: Float[Tensor, "... n_features"], W_dec: Float[Tensor, "n_features d_out"]
) -> Float[Tensor, "... d_out"]:
    """`activations W_dec` in the precision of the activations."""
    if W_dec.dtype == activations.dtype:
        return activations @ W_dec
    out = activations.new_zeros(*activations.shape[:-1], W_dec.shape[1])
    for rows in _pieces(W_dec):
        out += activations[..., rows] @ W_dec[rows].to(activations.dtype)
    return out


def _pieces(matrix: Float[Tensor, "rows width"]) -> Iterator[slice]:
    each = max(1, CONVERTED_AT_ONCE // matrix.shape[1])
    return (slice(start, start + each) for start in range(0, len(matrix), each))
