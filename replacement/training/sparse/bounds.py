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
_FEW_TOKENS = 128  # tell what all tokens share
_FEW_LONG = 64  # one in so many features may have larger errors than are called usual


class Product:
    """`W_enc x^T + b_enc` in bfloat16, some tokens at a time, in one piece of memory.

    The few tokens come second, so that little is packed anew for each chunk. The bias is two more columns, what
    bfloat16 keeps of it and of the rest: to add it would read and write every result once more.

    Where errors are bounded, no result, before it is rounded, is below the exact one: two further columns add
    `|x - x'| |w| + |x'| (|w - w'| + what summing in float32 may lose)`, x' and w' being what bfloat16 keeps
    (Cauchy-Schwarz). A few long rows then cost the others nothing. There, what all tokens share is multiplied once and
    added to the bias: of activations whose mean is several times their spread, bfloat16 would leave little else. Where
    errors are not bounded a result is a function of its own token alone, whichever others come with it: processes that
    share a batch choose by it.
    """

    usual: Float[Tensor, " tokens"]  #: what is added at most features for rows and inputs, no more (biases aside)
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
        shared = _shared(x) if bounded else None
        self.x, *of_tokens = _short(x, dtype, bounded, without=shared)
        self.W, *of_features = _short(W_enc, dtype, bounded)
        self.x[:, self.d : self.d + 2] = 1
        self.lost = self.W.shape[1] * 2.0**-23  # of a sum's terms, at most
        self.at_shared = torch.zeros_like(b_enc) if shared is None else W_enc.to(shared.dtype) @ shared
        if shared is not None:
            norm, error = of_tokens
            length, taken = of_features
            worst = taken + self.lost * length
            far = torch.linalg.vector_norm(shared).float() * 1.01
            self.lost_at_shared, usual = self.lost * far * length, _of_most(length)
            self.x[:, self.d + 2], self.x[:, self.d + 3] = error * _UP, norm * _UP
            self.W[:, self.d + 2], self.W[:, self.d + 3] = length * _UP, worst * _UP
            self.usual = (error + self.lost * far) * usual + norm * _of_most(worst)
            self.finite = torch.isfinite((norm.amax() + far) * length.amax())
        self.set_bias(b_enc)

    def set_bias(self, b_enc: Float[Tensor, " n_features"]) -> None:
        """Work with this bias from here on."""
        bias = b_enc + self.at_shared
        high = bias.to(self.W.dtype)
        low = (bias - high).nan_to_num(0.0, 0.0, 0.0)  # a bias may be infinite
        if self.bounded:
            lost = low.abs() * (_UP - 1) + bias.abs() * self.lost + self.lost_at_shared
            low = low + lost.nan_to_num(0.0, 0.0, 0.0)
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


def _short(
    rows: Float[Tensor, "rows d"], dtype: torch.dtype, bounded: bool, *, without: Float[Tensor, " d"] | None = None
) -> tuple[Tensor, ...]:
    """Rows, less one that all share, in this precision, with zeros up to a length that has room for further columns
    and multiplies fast; and if wanted, a little too large, their norms and the norms of what rounding took away."""
    n, d = rows.shape
    out = rows.new_empty(n, -(-(d + (4 if bounded else 2)) // _EVEN) * _EVEN, dtype=dtype)
    out[:, d:] = 0
    exact = torch.promote_types(rows.dtype, torch.float32)
    norm, error = rows.new_empty(2, n, dtype=exact)
    step = max(1, _PIECE // max(1, d))
    rest, taken = rows.new_empty(2, min(step, n), d, dtype=exact)
    for start in range(0, n, step):
        at = slice(start, start + step)
        piece, kept = rows[at], out[at, :d]
        if without is not None:
            piece = torch.sub(piece, without, out=rest[: len(piece)])
        kept.copy_(piece)
        if bounded:
            torch.linalg.vector_norm(piece, dim=1, dtype=exact, out=norm[at])
            torch.linalg.vector_norm(taken[: len(piece)].copy_(kept).sub_(piece), dim=1, out=error[at])
    return (out, norm.float() * 1.01 + _SHORT, error.float() * 1.01 + _SHORT) if bounded else (out,)


def _shared(x: Float[Tensor, "tokens d"]) -> Float[Tensor, " d"]:
    """The median of a few tokens: a mean would follow a few very long ones, away from all others."""
    some = x[:: -(-len(x) // _FEW_TOKENS) or 1].to(torch.promote_types(x.dtype, torch.float32))
    return kth_largest(some.T, (len(some) + 1) // 2) if len(some) else some.new_zeros(x.shape[1])


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
