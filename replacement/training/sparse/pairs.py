"""Features that are pairs of encoder rows, of many tokens at once: which are active, their values, exact gradients.

A head's largest product is the product of its largest factors, so most heads are ruled out by one look at each, and
only pairs of the others are ever multiplied. Knows nothing of decoders and losses.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.encoding import Kronecker
from replacement.training.sparse.active import ActiveSet, active_at, in_order
from replacement.training.sparse.bounds import Product
from replacement.training.sparse.products import encode_active

_CHUNK = 1 << 20  # pre-activations held at once
_STEEPEST = 100.0  # bounds the slope of sqrt(p q) in training, which grows without limit where p is near 0


@torch.no_grad()
def pairs_above(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "rows d_in"],
    b_enc: Float[Tensor, " rows"],
    levels: Float[Tensor, " n_features"],
    form: Kronecker,
) -> ActiveSet:
    """The features with `mAND(p, q) > level`, levels not negative; decided in bfloat16 where that is fast."""
    size, groups = len(levels), form.m + form.n
    heads, found = len(W_enc) // groups, [torch.empty(0, dtype=torch.long, device=x.device)]
    square = levels.square().view(heads, -1).T
    least = square.amin(0)[:, None]
    for start, rows in Product(x, W_enc, b_enc, bounded=False).chunks():
        pre = rows.view(groups, heads, -1)
        p, q = pre[: form.m].amax(0).float(), pre[form.m :].amax(0).float()
        head, token = ((p > 0) & (p * q > least)).nonzero().unbind(1)
        near = pre[:, head, token].float().relu()
        product = (near[: form.m, None] * near[None, form.m :]).flatten(0, 1)
        inside, entry = (product > square[:, head]).nonzero().unbind(1)
        found.append((token[entry] + start) * size + head[entry] * form.m * form.n + inside)
    return active_at(in_order(found, len(x) * size), len(x), size)


@torch.no_grad()
def pairs_top(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "rows d_in"],
    b_enc: Float[Tensor, " rows"],
    k: int,
    form: Kronecker,
) -> ActiveSet:
    """The k largest `mAND(p, q)` of each token, of those above 0.

    The k heads with the largest products hold them all.
    """
    groups, found = form.m + form.n, [torch.empty(0, dtype=torch.long, device=x.device)]
    heads, size = len(W_enc) // groups, form.n_features(len(W_enc))
    rows = max(1, _CHUNK // len(W_enc))
    for start in range(0, len(x), rows):
        pre = F.linear(x[start : start + rows], W_enc, b_enc).relu_().view(-1, groups, heads)
        best = pre[:, : form.m].amax(1) * pre[:, form.m :].amax(1)
        head = best.topk(min(k, heads), dim=1, sorted=False).indices  # [tokens, chosen]
        near = pre.gather(2, head[:, None].expand(-1, groups, -1)).transpose(1, 2)
        product = (near[:, :, : form.m, None] * near[:, :, None, form.m :]).flatten(1)
        value, at = product.topk(min(k, product.shape[1]), dim=1, sorted=False)
        inside = form.m * form.n
        feature = head.gather(1, at // inside) * inside + at % inside
        token = torch.arange(start, start + len(pre), device=x.device)[:, None]
        found.append((token * size + feature)[value > 0])
    return active_at(in_order(found, len(x) * size), len(x), size)


def encode_pairs(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "rows d_in"],
    b_enc: Float[Tensor, " rows"],
    active: ActiveSet,
    form: Kronecker,
) -> Float[Tensor, " entries"]:
    """`mAND(p, q)` of every active feature, from its two rows alone; gradients flow to all three arguments."""
    both = torch.stack(form.pair(active.feature, len(W_enc)), 1).flatten()
    of_rows = ActiveSet(active.token.repeat_interleave(2), both, active.n_tokens, len(W_enc))
    p, q = encode_active(x, W_enc, b_enc, of_rows).view(-1, 2).unbind(1)
    return multiply(p, q)


def dense_pairs(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "rows d_in"],
    b_enc: Float[Tensor, " rows"],
    features: Int[Tensor, " n"] | None,
    form: Kronecker,
) -> Float[Tensor, "tokens n"]:
    """`mAND(p, q)` of the listed features (None: all) at every token, where tokens or features are few."""
    pre = F.linear(x, W_enc, b_enc)
    if features is None:
        p, q = form.all_pairs(pre)
        return multiply(*torch.broadcast_tensors(p, q)).flatten(1)
    first, second = form.pair(features, len(W_enc))
    return multiply(pre[:, first], pre[:, second])


def multiply(p: Float[Tensor, "*axes"], q: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """`sqrt(p q)` where both are positive, else 0; its slope is cut where it would run away."""
    return _Multiply.apply(p, q)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, q):
        ctx.save_for_backward(p, q)
        return (p.relu() * q.relu()).sqrt()

    @staticmethod
    def backward(ctx, grad):
        p, q = ctx.saved_tensors
        both = (p > 0) & (q > 0)
        ratio = torch.where(both, q, 1.0).sqrt() / torch.where(both, p, 1.0).sqrt()
        slopes = (0.5 * ratio).clamp_max(_STEEPEST), (0.5 / ratio).clamp_max(_STEEPEST)
        return tuple(grad * slope * both for slope in slopes)
