"""Choosing the active features of many tokens: by threshold, or the k largest of each token.

A bfloat16 product, a few tokens at a time, leaves few candidates. The exact values of those decide, and a bound on the
product's rounding errors tells the few tokens at which something else could have been chosen; these take the plain
product. Knows nothing of decoders and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from replacement.training.sparse.active import ActiveSet, active_at, in_order
from replacement.training.sparse.products import dots
from replacement.training.sparse.search import (
    as_bits,
    at_least,
    divided,
    kth_largest,
    level_above,
    level_below,
    places,
)

_CHUNK = 1 << 20  # pre-activations held at once, or four times as many,
_FAST_TOKENS, _LEAST_TOKENS = 256, 128  # so that they are of so many tokens: with fewer the product slows down
_RESULT = 2.0**-7  # bounds the relative error of rounding a result to bfloat16, twice over
_SAMPLE = 32  # tokens that tell where the k-th largest pre-activations lie
_PIECE = 512  # rows whose rounding errors are measured at once
_EVEN = 16  # lengths of rows that multiply fast are multiples of this
_CROWD = 4  # times k, and no fewer than
_FEW = 64  # candidates: a token with more takes the plain product
_SHORT = 1e-15  # squares of what rounding takes away from shorter rows underflow
_DENSE = 1 << 20  # pre-activations held at once where all are needed


def preselect(
    x: Float[Tensor, "tokens d_in"], W_enc: Float[Tensor, "n_features d_in"], b_enc: Float[Tensor, " n_features"]
) -> BFloat16[Tensor, "tokens n_features"]:
    """Pre-activations in bfloat16, good enough to choose active features by and for nothing else."""
    dtype = torch.bfloat16 if multiplies_bfloat16(x.device) else torch.float32
    with torch.no_grad():
        return torch.addmm(b_enc.to(dtype), x.to(dtype), W_enc.to(dtype).T).bfloat16()


@torch.no_grad()
def select_above(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    threshold: float = 1.0,
) -> ActiveSet:
    """The features whose pre-activation `x . W_enc_i + b_enc_i` is above a positive threshold, as bfloat16 tells."""
    found = []
    for start, pre in _Product(x, W_enc, b_enc, bounded=False).chunks():
        found.append(_flat(as_bits(pre), level_above(threshold, pre.shape[1], x.device), start))
    return active_at(in_order(found, len(x) * len(W_enc)), len(x), len(W_enc))


@torch.no_grad()
def select_top(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    k: int,
) -> ActiveSet:
    """The k largest pre-activations `x . W_enc_i + b_enc_i` of each token, also where they are negative (TopK).

    Every token gets min(k, n_features) entries; decided in the precision of x, between equals any is taken.
    """
    k = min(k, len(W_enc))
    groups = 1 << (8 * k - 1).bit_length()  # the k-th largest of so many maxima is near the k-th largest of all
    if 2 * groups > len(W_enc) or not len(x):
        return _each(_dense_top(x, W_enc, b_enc, k), None, len(W_enc))
    lift = _lift(x, W_enc, b_enc, k)
    product = _Product(x, W_enc, b_enc + lift)
    size, found, levels = len(W_enc) // groups, [], []
    for start, pre in product.chunks():
        bits = as_bits(pre)
        highest = bits[: size * groups].unflatten(0, (size, groups)).amax(0)
        kth = kth_largest(highest.T, k).view(torch.bfloat16).float()
        margin = product.margin[start : start + len(kth)]
        levels.append(level_below((kth * (1 - _RESULT) - margin) * (1 - _RESULT)))  # nearly all are then certain
        found.append(_flat(bits, levels[-1], start))
    feature, pre = _top_of_each(in_order(found, len(x) * len(W_enc)), x, W_enc, b_enc, k)
    level = torch.cat(levels).view(torch.bfloat16)  # what was not found is below it
    rest = places(~(level <= (pre.amin(1) + lift - product.margin) * (1 - _RESULT)))  # not certain
    feature[rest] = _dense_top(x[rest], W_enc, b_enc, k)
    again = _each(feature[rest], None, len(W_enc))
    pre[rest] = _values(x[rest], W_enc, b_enc, again.token, again.feature, again.starts).view(len(rest), k)
    return _each(feature, pre, len(W_enc))


def _flat(bits: Tensor, level: Tensor, start: int) -> Int[Tensor, " entries"]:
    """What reaches the level of its token, of tokens from `start` on, as places in [tokens, n_features]."""
    feature, token = divided(at_least(bits, level), len(level), size=bits.numel())
    return (token + start) * len(bits) + feature


def _each(feature: Int[Tensor, "tokens k"], pre: Float[Tensor, "tokens k"] | None, n_features: int) -> ActiveSet:
    """The set in which every token has these features."""
    token = torch.arange(len(feature), device=feature.device).repeat_interleave(feature.shape[1])
    return ActiveSet(token, feature.flatten(), len(feature), n_features, None if pre is None else pre.flatten())


def _values(x: Tensor, W_enc: Tensor, b_enc: Tensor, token: Tensor, feature: Tensor, starts: Tensor) -> Tensor:
    return dots(x, W_enc, token, feature, starts) + b_enc.index_select(0, feature)


def _lift(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Float[Tensor, ""]:
    """What to add to all pre-activations so that the k-th largest of nearly every token is above 0, as a comparison of
    bits needs; the order stays. Trained features are below 0 at most tokens.

    No more than most tokens need: far above 0, bfloat16 is too coarse to tell features apart.
    """
    sample = x[:: max(1, len(x) // _SAMPLE)]
    kth = torch.addmm(b_enc, sample, W_enc.T).topk(k, dim=1, sorted=False).values.amin(1).sort().values
    low, middle = kth[len(kth) // 16], kth[len(kth) // 2]
    return (middle - 2 * low).clamp_min(0) * (low <= 0.1 * middle)


class _Product:
    """`W_enc x^T + b_enc` in bfloat16, some tokens at a time, in one piece of memory.

    The few tokens come second, so that little is packed anew for each chunk. The bias is two more columns, what
    bfloat16 keeps of it and of the rest: to add it would read and write every result once more.
    """

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, *, bounded: bool = True) -> None:
        """bounded: whether the bound on errors is wanted."""
        dtype = torch.bfloat16 if multiplies_bfloat16(x.device) else torch.float32
        usual = _CHUNK // max(1, len(W_enc))
        self.tokens = max(usual, min(4 * usual, _FAST_TOKENS), _LEAST_TOKENS)
        one = torch.ones(1, dtype=dtype, device=x.device)
        high = b_enc.to(dtype)
        self.x = _extended(x, one, one)
        low = (b_enc - high).to(dtype)
        self.W = _extended(W_enc, high, low if bounded else low.nan_to_num(0.0, 0.0, 0.0))  # a bias may be infinite
        if bounded:
            self.margin = self._margin(x, W_enc, b_enc)

    def _margin(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Float[Tensor, " tokens"]:
        """A bound on the errors of a token's results before they are rounded: `|x - x'| |w| + |x'| |w - w'| + |b - b'|`
        by Cauchy-Schwarz, the largest over features, with what summing in float32 may lose."""
        d, sums = x.shape[1], self.W.shape[1] * 2.0**-24
        norm, error = _errors(x, self.x[:, :d])
        longest, worst = (each.max() for each in _errors(W_enc, self.W[:, :d]))
        kept = self.W[:, d].to(b_enc.dtype) + self.W[:, d + 1]
        bias = (kept - b_enc).abs().max() + b_enc.abs().max() * sums
        margin = error * longest + norm * (worst + 2 * sums * longest) + bias.float()
        if (short := (norm < _SHORT) | (longest < _SHORT)).any():
            margin = margin.masked_fill(short & x.ne(0).any(1), torch.inf)
        return margin

    def chunks(self) -> Iterator[tuple[int, BFloat16[Tensor, "n_features tokens"]]]:
        """First token and pre-activations, overwritten by the next chunk."""
        n_features = len(self.W)
        memory = self.W.new_empty(n_features * min(self.tokens, len(self.x)))
        for start in range(0, max(1, len(self.x)), self.tokens):  # an empty chunk where there are no tokens
            x = self.x[start : start + self.tokens]
            with _whole_sums(x.device):
                pre = torch.mm(self.W, x.T, out=memory[: n_features * len(x)].view(n_features, len(x)))
            yield start, pre.bfloat16()


def _extended(rows: Float[Tensor, "rows d"], *columns: Float[Tensor, " rows_or_1"]) -> Float[Tensor, "rows width"]:
    """Rows in the columns' precision with these further ones, and zeros up to a length that multiplies fast."""
    d = rows.shape[1]
    out = rows.new_zeros(len(rows), -(-(d + len(columns)) // _EVEN) * _EVEN, dtype=columns[0].dtype)
    out[:, :d] = rows
    for at, column in enumerate(columns, d):
        out[:, at] = column
    return out


def _errors(
    exact: Float[Tensor, "rows d"], kept: Float[Tensor, "rows d"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Norms of rows, a little too large, and of what rounding took away from them."""
    pieces = zip(exact.split(_PIECE), kept.split(_PIECE), strict=True)  # small enough for the cache
    error = torch.cat([(piece - short.to(piece.dtype)).norm(dim=1) for piece, short in pieces])
    return exact.norm(dim=1).float() * 1.01, error.float()


@contextmanager
def _whole_sums(device: torch.device) -> Iterator[None]:
    """Products of bfloat16 summed in float32 to the end, as the margins suppose; a GPU may round partial sums."""
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


def _dense_top(x: Tensor, W: Tensor, b: Tensor, k: int) -> Int[Tensor, "tokens k"]:
    """The features with the k largest values of each token by the plain product, ascending."""
    pieces = x.split(max(1, _DENSE // len(W)))
    return torch.cat(
        [torch.addmm(b, piece, W.T).topk(k, dim=1, sorted=False).indices.sort(dim=1).values for piece in pieces]
    )


def _top_of_each(
    flat: Int[Tensor, " entries"], x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Of these places, ascending, the k with the largest exact values of each token: features, ascending, and values.

    A token with fewer places than k, or with many times more, has the value -inf among them.
    """
    token, feature = divided(flat, len(W_enc), size=len(x) * len(W_enc))
    count = torch.bincount(token, minlength=len(x))
    if (crowded := count > max(_CROWD * k, _FEW)).any():
        return _top_of_each(flat[~crowded[token]], x, W_enc, b_enc, k)
    starts = count.cumsum(0) - count
    values = _values(x, W_enc, b_enc, token, feature, starts)
    most = max(k, int(count.max()))
    of_token, named = values.new_full((len(x), most), -torch.inf), feature.new_zeros(len(x), most)
    place = token * most + torch.arange(len(flat), device=flat.device) - starts.index_select(0, token)
    of_token.view(-1).index_copy_(0, place, values)
    named.view(-1).index_copy_(0, place, feature)
    chosen = of_token >= kth_largest(of_token, k)[:, None]
    uneven = places(chosen.sum(1) != k)  # equals, or too few
    first = of_token[uneven].topk(k, dim=1, sorted=False).indices
    chosen[uneven] = torch.zeros_like(chosen[uneven]).scatter_(1, first, True)
    at = places(chosen)
    found, kept = (each.view(-1).index_select(0, at).view(len(x), k) for each in (named, of_token))
    return found, kept
