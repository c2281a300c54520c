"""Values of active features, what they write, and the exact gradients of both, over active entries alone.

Two primitives are under all of it: `sums` and `dots`. On GPUs they are Triton's (`kernels`), where Triton is installed.
Knows nothing of how the active ones were chosen.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from replacement.training.sparse.active import ActiveSet, segment_starts

_PIECE = 1 << 16  # entries whose rows are gathered at once where there is no better way


def encode_active(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    active: ActiveSet,
    known: Float[Tensor, " entries"] | None = None,
) -> Float[Tensor, " entries"]:
    """`x_t . W_enc_i + b_enc_i` for every active feature i at token t; gradients flow to all three arguments.

    known: these values, where they are known already.
    """
    return _Encode.apply(x, W_enc, b_enc, active, known)


def decode_active(
    values: Float[Tensor, " entries"],
    W_dec: Float[Tensor, "n_features d_out"],
    active: ActiveSet,
    prefixes: tuple[int, ...] = (),
) -> Float[Tensor, "tokens prefixes_1 d_out"]:
    """What the first `prefixes[p]` features write at each token, for every p, and last what all of them do.

    `out[t, p] = sum over active i < prefixes[p] of values_ti W_dec_i`: nested dictionaries share one encoding
    (Matryoshka, Bussmann et al. 2025). Gradients flow to `values` and `W_dec`.

    prefixes: ascending sizes below n_features.
    """
    n = len(prefixes) + 1
    if n == 1:
        return _Decode.apply(values, W_dec, active, active.token, active.n_tokens).unsqueeze(1)
    edges = torch.tensor(prefixes, dtype=torch.long, device=values.device)
    slot = active.token * n + torch.bucketize(active.feature, edges, right=True)
    parts = _Decode.apply(values, W_dec, active, slot, active.n_tokens * n)
    return parts.view(active.n_tokens, n, W_dec.shape[1]).cumsum(1)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, active, known):
        ctx.save_for_backward(x, W_enc)
        ctx.active = active
        if known is not None:
            return known.clone()
        return dots(x, W_enc, active.token, active.feature, active.starts) + b_enc.index_select(0, active.feature)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, W_enc), active = ctx.saved_tensors, ctx.active
        grad_x = grad_W = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = sums(W_enc, active.feature, grad, active.starts)
        if ctx.needs_input_grad[1]:
            order, token, starts = active.by_feature
            grad_W = sums(x, token, grad.index_select(0, order), starts)
        if ctx.needs_input_grad[2]:
            grad_b = _of_each_feature(grad, active)
        return grad_x, grad_W, grad_b, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, W_dec, active, slot, n_slots):
        starts = active.starts if n_slots == active.n_tokens else segment_starts(slot, n_slots)
        ctx.save_for_backward(values, W_dec, slot, starts)
        ctx.active = active
        return sums(W_dec, active.feature, values, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (values, W_dec, slot, starts), active = ctx.saved_tensors, ctx.active
        grad, grad_values, grad_W = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_values = dots(grad, W_dec, slot, active.feature, starts)
        if ctx.needs_input_grad[1]:
            order, token, by_feature = active.by_feature
            grad_W = sums(
                grad,
                token if slot is active.token else slot.index_select(0, order),
                values.index_select(0, order),
                by_feature,
            )
        return grad_values, grad_W, None, None, None


def _of_each_feature(values: Float[Tensor, " entries"], active: ActiveSet) -> Float[Tensor, " n_features"]:
    """The sum of each feature's entries, always in the same order: a GPU's `index_add_` takes any."""
    if values.device.type == "cpu":
        return values.new_zeros(active.n_features).index_add_(0, active.feature, values)
    order, _, starts = active.by_feature
    return sums(values.unsqueeze(1), order, torch.ones_like(values), starts).squeeze(1)


@cache
def kernels_on(device: str) -> ModuleType | None:
    """The module of kernels for this type of device, or None where torch's own functions have to do."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    from replacement.training.sparse import kernels as compiled  # late: without a GPU there may be no Triton

    return compiled


def sums(
    table: Float[Tensor, "rows d"],
    index: Int[Tensor, " entries"],
    weight: Float[Tensor, " entries"],
    starts: Int[Tensor, " segments"],
) -> Float[Tensor, "segments d"]:
    """`out[s] = sum of weight[e] table[index[e]]` over the entries from `starts[s]` to the next segment's."""
    if (compiled := kernels_on(table.device.type)) is not None:
        return compiled.sums(table, index, weight, starts)
    return F.embedding_bag(index, table.contiguous(), starts, mode="sum", per_sample_weights=weight)


def dots(
    a: Float[Tensor, "rows d"],
    b: Float[Tensor, "columns d"],
    row: Int[Tensor, " entries"],
    column: Int[Tensor, " entries"],
    starts: Int[Tensor, " rows"] | None = None,
) -> Float[Tensor, " entries"]:
    """`a[row[e]] . b[column[e]]` for every entry e; `row` ascends, and a place may be asked for more than once.

    starts: where each row's entries begin, if that is known.
    """
    if (compiled := kernels_on(a.device.type)) is not None:
        return compiled.dots(a, b, row, column)
    if len(row) > len(a) * len(b):  # torch refuses a sparse pattern of more entries than places; all are fewer here
        return (a @ b.T).flatten().index_select(0, row * len(b) + column)
    if a.dtype in (torch.float32, torch.float64) and torch.backends.mkl.is_available() and a.device.type == "cpu":
        starts = segment_starts(row, len(a)) if starts is None else starts
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            pattern = torch.sparse_csr_tensor(
                torch.cat([starts, starts.new_tensor([len(row)])]),
                column,
                a.new_zeros(len(row)),
                (len(a), len(b)),
                check_invariants=False,
            )
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    out = a.new_empty(len(row))
    for start in range(0, len(row), _PIECE):
        piece = slice(start, start + _PIECE)
        out[piece] = (a[row[piece]] * b[column[piece]]).sum(1)
    return out
