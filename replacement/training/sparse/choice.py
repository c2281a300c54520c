"""Choosing the active features of many tokens: by threshold, or the k largest of each token.

A bfloat16 product, a few tokens at a time, leaves few candidates: all that could be chosen, given a bound on its
rounding errors. The exact values of those decide. Knows nothing of decoders and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Int, Int16
from torch import Tensor

from replacement.training.sparse.active import (
    ActiveSet,
    active_at,
    as_bits,
    at_least,
    in_order,
    level_above,
    segment_starts,
    split_places,
)
from replacement.training.sparse.products import dots

_CHUNK = 1 << 20  # pre-activations held at once,
_CHUNK_TOKENS = 128  # but of at least this many tokens, or the product slows down
_RESULT = 2.0**-7  # bounds the relative error of rounding a result to bfloat16, twice over
_SAMPLE = 32  # tokens that tell where the k-th largest pre-activations lie
_PIECE = 512  # rows whose rounding errors are measured at once
_NEVER = torch.iinfo(torch.int16).max


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
    """`select(preselect(x, W_enc, b_enc), threshold)` without ever holding all pre-activations."""
    size, found = len(W_enc), []
    for start, pre, _ in _Product(x, W_enc, b_enc, bounded=False).chunks():
        found.append(at_least(as_bits(pre), level_above(threshold, len(pre), x.device)) + start * size)
    return active_at(in_order(found, len(x) * size), len(x), size)


@torch.no_grad()
def select_top(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    k: int,
) -> ActiveSet:
    """The k largest pre-activations `x . W_enc_i + b_enc_i` of each token, also where they are negative (TopK).

    Every token gets min(k, n_features) entries; decided in float32, between equals any is taken.
    """
    n_tokens, n_features = len(x), len(W_enc)
    k = min(k, n_features)
    groups = 1 << (4 * k - 1).bit_length()  # the k-th largest of so many maxima is near the k-th largest of all
    if 4 * groups > n_features:
        return active_at(_dense_top(x, W_enc, b_enc, k, torch.arange(n_tokens, device=x.device)), n_tokens, n_features)
    found, hard = [], []
    for start, pre, margin in _Product(x, W_enc, b_enc + _lift(x, W_enc, b_enc, k)).chunks():
        bits, size = as_bits(pre), n_features // groups
        highest = bits[:, : size * groups].unflatten(1, (size, groups)).amax(1).int()
        kth = highest.topk(k, sorted=False).values.amin(1).to(torch.int16).view(torch.bfloat16).float()
        level, easy = _floor((kth * (1 - _RESULT) - 2 * margin) * (1 - _RESULT))
        found.append(at_least(bits, level) + start * n_features)
        hard.append((~easy).nonzero().flatten() + start)
    flat = in_order(found, n_tokens * n_features)
    token, feature = split_places(flat, n_features)
    values = dots(x, W_enc, token, feature) + b_enc.index_select(0, feature)
    chosen = flat.index_select(0, _top_of_each(token, values, n_tokens, k))
    rest = _dense_top(x, W_enc, b_enc, k, torch.cat(hard))
    return active_at(torch.cat([chosen, rest]).sort().values if len(rest) else chosen, n_tokens, n_features)


def _lift(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor | float:
    """What to add to all pre-activations so that the k-th largest of nearly every token is above 0, as a comparison of
    bits needs; the order stays. Trained features are below 0 at most tokens.

    No more than most tokens need: far above 0, bfloat16 is too coarse to tell features apart.
    """
    if not len(x):
        return 0.0
    sample = x[:: max(1, len(x) // _SAMPLE)]
    kth = torch.addmm(b_enc, sample, W_enc.T).topk(k, dim=1, sorted=False).values.amin(1).sort().values
    low, middle = kth[len(kth) // 16], kth[len(kth) // 2]
    return (middle - 2 * low).clamp_min(0) * (low <= 0.1 * middle)


class _Rounded(NamedTuple):
    """Rows as they are multiplied, with what bounds the errors of their products."""

    rows: Float[Tensor, "rows d_in"]
    norm: Float[Tensor, " rows"]
    error: Float[Tensor, " rows"]  #: norm of what rounding took away, and of what summing in float32 may


class _Product:
    """`x W_enc^T + b_enc` in bfloat16, some tokens at a time, in one piece of memory."""

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, *, bounded: bool = True) -> None:
        """bounded: whether margins are wanted; where not, they are zero and cost nothing."""
        dtype = torch.bfloat16 if multiplies_bfloat16(x.device) else torch.float32
        rounded = _rounded if bounded else _unbounded
        self.x, self.W, self.b = rounded(x, dtype), rounded(W_enc, dtype), b_enc.to(dtype)
        self.norm, self.error = self.W.norm.max(), self.W.error.max()
        self.b_error = (self.b - b_enc).abs().max()
        self.tokens = max(_CHUNK_TOKENS, _CHUNK // len(W_enc))

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token, pre-activations (overwritten by the next chunk) and a bound on their errors before the result is
        rounded: `|x - x'| |w| + |x'| |w - w'| + |b - b'|` by Cauchy-Schwarz, the largest over features."""
        n_tokens, n_features = len(self.x.rows), len(self.W.rows)
        memory = self.b.new_empty(min(self.tokens, n_tokens), n_features)
        for start in range(0, max(1, n_tokens), self.tokens):  # an empty chunk where there are no tokens
            piece = slice(start, min(start + self.tokens, n_tokens))
            margin = self.x.error[piece] * self.norm + self.x.norm[piece] * self.error + self.b_error
            with _whole_sums(self.b.device):
                pre = torch.addmm(self.b, self.x.rows[piece], self.W.rows.T, out=memory[: piece.stop - start])
            yield start, pre.bfloat16(), margin


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


def _rounded(rows: Tensor, dtype: torch.dtype) -> _Rounded:
    rounded = rows.to(dtype)
    norm = rows.norm(dim=1).float() * 1.01
    pieces = zip(rows.split(_PIECE), rounded.split(_PIECE), strict=True)  # small enough for the cache
    error = torch.cat([(piece - short.to(piece.dtype)).norm(dim=1) for piece, short in pieces]).float()
    return _Rounded(rounded, norm, error + norm * (rows.shape[1] * 2.0**-24))


def _unbounded(rows: Tensor, dtype: torch.dtype) -> _Rounded:
    zeros = rows.new_zeros(len(rows))
    return _Rounded(rows.to(dtype), zeros, zeros)


def _floor(level: Float[Tensor, " rows"]) -> tuple[Int16[Tensor, "rows 1"], Bool[Tensor, " rows"]]:
    """The next bfloat16 below as an integer, and whether it is positive; where not, a level that nothing reaches."""
    easy = level > 0
    bits = (level.float().contiguous().view(torch.int32) >> 16).to(torch.int16)
    return torch.where(easy, bits, _NEVER).to(torch.int16).unsqueeze(1), easy


def _dense_top(x: Tensor, W: Tensor, b: Tensor, k: int, rows: Int[Tensor, " rows"]) -> Int[Tensor, " entries"]:
    """Places in the flattened matrix of the k largest of some tokens, by the plain product."""
    parts = [
        (some.unsqueeze(1) * len(W) + torch.addmm(b, x[some], W.T).topk(k, dim=1, sorted=False).indices).flatten()
        for some in rows.split(max(1, _CHUNK // len(W)))
    ]
    return torch.cat(parts).sort().values


def _top_of_each(
    token: Int[Tensor, " entries"], values: Float[Tensor, " entries"], n_tokens: int, k: int
) -> Int[Tensor, " chosen"]:
    """Which entries, ascending, are among the k largest of their token; `token` ascends."""
    bits = values.float().view(torch.int32)
    falling = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).bitwise_not_()  # integers in the opposite order of the floats
    by_value = falling.sort().indices
    narrow = torch.int16 if n_tokens <= 1 << 15 else torch.int32  # short keys sort faster
    order = by_value.index_select(0, token.to(narrow).index_select(0, by_value).sort(stable=True).indices)
    rank = torch.arange(len(token), device=token.device) - segment_starts(token, n_tokens).index_select(0, token)
    keep = torch.zeros(len(token), dtype=torch.bool, device=token.device)
    return keep.index_fill_(0, order[rank < k], True).nonzero().flatten()
