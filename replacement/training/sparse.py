"""Sparse encoding and decoding of many tokens at once, with exact gradients, fast on a CPU.

Only the encoder's product is dense, and only to *choose* the active features: that product runs in bfloat16. Values of
the chosen ones, the decoder and every gradient touch active entries alone, in the weights' own precision. Knows nothing
of losses, layers or training steps.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_WORD = 8  # bools in one 64-bit word


class ActiveSet(NamedTuple):
    """Which features fire at which tokens: one entry each, ordered by token, then by feature."""

    token: Int[Tensor, " entries"]
    feature: Int[Tensor, " entries"]
    n_tokens: int
    n_features: int


def preselect(
    x: Float[Tensor, "tokens d_in"], W_enc: Float[Tensor, "n_features d_in"], b_enc: Float[Tensor, " n_features"]
) -> Float[Tensor, "tokens n_features"]:
    """Pre-activations in bfloat16, good enough to choose active features by and for nothing else."""
    with torch.no_grad():
        return torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16().T)


def select(pre: Float[Tensor, "tokens n_features"], threshold: float) -> ActiveSet:
    """The entries of `pre` (bfloat16) above a positive threshold.

    Positive floats order as their bits do, so the comparison runs on integers; zeros are skipped a 64-bit word at a
    time.
    """
    assert threshold > 0 and pre.shape[1] % _WORD == 0 and pre.dtype == torch.bfloat16
    level = torch.tensor(threshold, dtype=torch.bfloat16).view(torch.int16).item()
    fires = pre.contiguous().view(torch.int16) > level
    words = fires.view(torch.int64).flatten().nonzero().flatten()
    hits = fires.view(-1, _WORD)[words].nonzero()
    flat = words[hits[:, 0]] * _WORD + hits[:, 1]
    return ActiveSet(flat // pre.shape[1], flat % pre.shape[1], *pre.shape)


def decode_active(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    W_dec: Float[Tensor, "n_features d_out"],
    active: ActiveSet,
    prefixes: tuple[int, ...],
) -> tuple[Float[Tensor, "tokens prefixes d_out"], Float[Tensor, " entries"]]:
    """What the first `prefixes[p]` features write at each token, for every p, and the active values.

    `out[t, p] = sum over active i < prefixes[p] of (x_t . W_enc_i + b_enc_i) W_dec_i`: nested dictionaries share one
    encoding (Matryoshka, Bussmann et al. 2025). Gradients flow to `x` and the weights through active entries only; the
    values come without a gradient of their own.
    """
    edges = torch.tensor(prefixes[:-1], dtype=torch.long)
    group = torch.bucketize(active.feature, edges, right=True)
    slot = active.token * len(prefixes) + group
    parts, values = _DecodeActive.apply(x, W_enc, b_enc, W_dec, active, slot, active.n_tokens * len(prefixes))
    return parts.view(active.n_tokens, len(prefixes), W_dec.shape[1]).cumsum(1), values


class _DecodeActive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, active, slot, n_slots):
        token, feature = active.token, active.feature
        values = _dots(x, W_enc, token, feature) + b_enc[feature]
        parts = _sums(W_dec, feature, values, slot, n_slots)
        ctx.save_for_backward(x, W_enc, W_dec, values, slot)
        ctx.active = active
        ctx.mark_non_differentiable(values)
        return parts, values

    @staticmethod
    def backward(ctx, grad, _grad_values):
        x, W_enc, W_dec, values, slot = ctx.saved_tensors
        token, feature = ctx.active.token, ctx.active.feature
        grad = grad.contiguous()
        grad_values = _dots(grad, W_dec, slot, feature)
        order = torch.argsort(feature)
        by_feature, n_features = feature[order], W_dec.shape[0]
        grad_W_dec = _sums(grad, slot[order], values[order], by_feature, n_features)
        grad_W_enc = _sums(x, token[order], grad_values[order], by_feature, n_features)
        grad_b_enc = torch.zeros_like(W_dec[:, 0]).index_add_(0, feature, grad_values)
        grad_x = _sums(W_enc, feature, grad_values, token, x.shape[0]) if ctx.needs_input_grad[0] else None
        return grad_x, grad_W_enc, grad_b_enc, grad_W_dec, None, None, None


def _sums(table: Tensor, index: Tensor, weight: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """`out[s] = sum over entries e with segment[e] = s of weight[e] table[index[e]]`; `segment` ascends."""
    starts = torch.bincount(segment, minlength=n_segments).cumsum(0).roll(1)
    starts[0] = 0
    return F.embedding_bag(index, table.contiguous(), starts, mode="sum", per_sample_weights=weight)


def _dots(a: Tensor, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`a[row[e]] . b[column[e]]` for every entry e; `row` ascends."""
    if a.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available() and a.device.type == "cpu":
        starts = torch.zeros(len(a) + 1, dtype=torch.long)
        starts[1:] = torch.bincount(row, minlength=len(a)).cumsum(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(
                starts, column, a.new_zeros(len(row)), (len(a), len(b)), check_invariants=False
            )
        return torch.sparse.sampled_addmm(pattern, a, b.T.contiguous(), beta=0.0).values()
    out = a.new_empty(len(row))
    for start in range(0, len(row), 1 << 16):
        piece = slice(start, start + (1 << 16))
        out[piece] = (a[row[piece]] * b[column[piece]]).sum(1)
    return out
