"""Pre-activations in bfloat16, some tokens at a time, each, if wanted, with a bound on its own rounding errors added.

Knows nothing of what is chosen by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import BFloat16, Bool, Float
from torch import Tensor

from replacement.training.sparse.search import kth_largest

_CHUNK = 1 << 20  # pre-activations held at once, or four times as many,
_FAST_TOKENS, _LEAST_TOKENS = 256, 128  # so that they are of so many tokens: with fewer the product slows down
_PIECE = 1 << 17  # numbers whose rounding errors are measured at once: few enough for the cache
_EVEN = 16  # lengths of rows that multiply fast are multiples of this
_UP = 1 + 2.0**-6  # times a positive number, so that it stays no smaller in bfloat16, whatever else is rounded
_SHORT = 1e-15  # squares of what rounding takes away from shorter rows underflow
_FEW_LONG = 64  # one in so many features may have larger errors than are called usual


def preselect(
    x: Float[Tensor, "tokens d_in"], W_enc: Float[Tensor, "n_features d_in"], b_enc: Float[Tensor, " n_features"]
) -> BFloat16[Tensor, "tokens n_features"]:
    """Pre-activations in bfloat16, good enough to choose active features by and for nothing else."""
    dtype = torch.bfloat16 if multiplies_bfloat16(x.device) else torch.float32
    with torch.no_grad():
        return torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype).T).bfloat16()


class Product:
    """`W_enc x^T + b_enc` in bfloat16, some tokens at a time, in one piece of memory.

    The few tokens come second, so that little is packed anew for each chunk. The bias is two more columns, what
    bfloat16 keeps of it and of the rest: to add it would read and write every result once more.

    Where errors are bounded, no result, before it is rounded, is below the exact one: two further columns add
    `|x - x'| |w| + |x'| (|w - w'| + what summing in float32 may lose)`, x' and w' being what bfloat16 keeps
    (Cauchy-Schwarz). A few long rows then cost the others nothing.
    """

    usual: Float[Tensor, " tokens"]  #: what is added at most features for their rows and inputs, no more
    finite: Bool[Tensor, ""]  #: whether no number is so large that bfloat16 makes it infinite; else there is no bound

    def __init__(
        self,
        x: Float[Tensor, "tokens d_in"],
        W_enc: Float[Tensor, "n_features d_in"],
        b_enc: Float[Tensor, " n_features"],
        *,
        bounded: bool,
    ) -> None:
        dtype = torch.bfloat16 if multiplies_bfloat16(x.device) else torch.float32
        fit = _CHUNK // max(1, len(W_enc))
        self.tokens = max(fit, min(4 * fit, _FAST_TOKENS), _LEAST_TOKENS)
        self.d, self.bounded = x.shape[1], bounded
        self.x, *of_tokens = _short(x, dtype, bounded)
        self.W, *of_features = _short(W_enc, dtype, bounded)
        self.x[:, self.d : self.d + 2] = 1
        self.lost = self.W.shape[1] * 2.0**-23  # of a sum's terms, at most
        if bounded:
            norm, error = of_tokens
            length, taken = of_features
            worst = taken + self.lost * length
            self.x[:, self.d + 2], self.x[:, self.d + 3] = error * _UP, norm * _UP
            self.W[:, self.d + 2], self.W[:, self.d + 3] = length * _UP, worst * _UP
            self.usual = error * _of_most(length) + norm * _of_most(worst)
            self.finite = torch.isfinite(norm.amax() * length.amax())
        self.set_bias(b_enc)

    def set_bias(self, b_enc: Float[Tensor, " n_features"]) -> None:
        """Work with this bias from here on."""
        high = b_enc.to(self.W.dtype)
        low = (b_enc - high).nan_to_num(0.0, 0.0, 0.0)  # a bias may be infinite
        if self.bounded:
            low = low + (low.abs() * (_UP - 1) + b_enc.abs() * self.lost).nan_to_num(0.0, 0.0, 0.0)
        self.W[:, self.d], self.W[:, self.d + 1] = high, low

    def chunks(self, every: int = 1) -> Iterator[tuple[int, BFloat16[Tensor, "n_features tokens"]]]:
        """First token and pre-activations, overwritten by the next chunk; of every `every`-th token."""
        n_features, rows = len(self.W), self.x[::every]
        memory = self.W.new_empty(n_features * min(self.tokens, len(rows)))
        for start in range(0, max(1, len(rows)), self.tokens):  # an empty chunk where there are no tokens
            x = rows[start : start + self.tokens]
            with _whole_sums(x.device):
                pre = torch.mm(self.W, x.T, out=memory[: n_features * len(x)].view(n_features, len(x)))
            yield start, pre.bfloat16()


def _short(rows: Float[Tensor, "rows d"], dtype: torch.dtype, bounded: bool) -> tuple[Tensor, ...]:
    """Rows in this precision, with zeros up to a length that has room for further columns and multiplies fast; and if
    wanted, a little too large, their norms and the norms of what rounding took away from them."""
    n, d = rows.shape
    out = rows.new_empty(n, -(-(d + (4 if bounded else 2)) // _EVEN) * _EVEN, dtype=dtype)
    out[:, d:] = 0
    if not bounded:
        out[:, :d] = rows
        return (out,)
    norm, error = rows.new_empty(2, n)
    step = max(1, _PIECE // max(1, d))
    scratch = rows.new_empty(min(step, n), d)
    for start in range(0, n, step):
        at = slice(start, start + step)
        piece, kept = rows[at], out[at, :d]
        kept.copy_(piece)
        torch.linalg.vector_norm(piece, dim=1, out=norm[at])
        taken = scratch[: len(piece)].copy_(kept).sub_(piece)
        torch.linalg.vector_norm(taken, dim=1, out=error[at])
    return out, norm.float() * 1.01 + _SHORT, error.float() * 1.01 + _SHORT


def _of_most(sizes: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return kth_largest(sizes[None], 1 + len(sizes) // _FEW_LONG)[0]


@contextmanager
def _whole_sums(device: torch.device) -> Iterator[None]:
    """Products of bfloat16 summed in float32 to the end, as the bounds suppose; a GPU may round partial sums."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    if device.type == "cuda":
        settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        if device.type == "cuda":
            settings.allow_bf16_reduced_precision_reduction = before


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster there than those of float32."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type != "cpu" or known is None or known()
