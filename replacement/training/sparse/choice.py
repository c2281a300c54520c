"""Choosing the active features of many tokens: by threshold, or the k largest of each token.

Upper bounds by a product in bfloat16 leave few candidates. The exact values of those decide, and tell of the few tokens
at which something else could have been chosen; these take the plain product. Knows nothing of decoders and gradients.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.training.sparse.active import ActiveSet, active_at, in_order
from replacement.training.sparse.bounds import Product
from replacement.training.sparse.products import dots
from replacement.training.sparse.search import (
    as_bits,
    at_least,
    divided,
    kth_largest,
    level_above,
    level_below,
    places,
    transposed,
)

_RESULT = 2.0**-7  # bounds the relative error of rounding a result to bfloat16, twice over
_SAMPLE = 128  # tokens that tell where the k-th largest pre-activations lie
_SPREAD = 2.5  # of what the last tenth needs beyond the median, where 1.6 are what the last 2 % of a normal one need
_CROWD = 4  # times k, and no fewer than
_FEW = 64  # candidates: a token with more takes the plain product
_DENSE = 1 << 20  # pre-activations held at once where all are needed


@torch.no_grad()
def select_above(
    x: Float[Tensor, "tokens d_in"],
    W_enc: Float[Tensor, "n_features d_in"],
    b_enc: Float[Tensor, " n_features"],
    thresholds: Float[Tensor, " n_features"] | float = 1.0,
) -> ActiveSet:
    """The features whose pre-activation `x . W_enc_i + b_enc_i` is above a positive threshold, as bfloat16 tells."""
    level = level_above(torch.as_tensor(thresholds, device=x.device).clamp_min(0.0)).view(-1, 1)
    product = Product(x, W_enc, b_enc, bounded=False)
    found = [_flat(as_bits(pre), level, start) for start, pre in product.chunks()]
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
    product = Product(x, W_enc, b_enc, bounded=True)
    lift = _lift(product, groups, k)
    product.set_bias(b_enc + lift)
    found, levels = [], []
    for start, pre in product.chunks():
        bits = as_bits(pre)
        kth = kth_largest(_maxima(bits, groups), k).view(torch.bfloat16).float()
        levels.append(level_below(kth * (1 - _RESULT) - product.usual[start : start + len(kth)]))
        found.append(_flat(bits, levels[-1], start))
    feature, pre = _top_of_each(in_order(found, len(x) * len(W_enc)), x, W_enc, b_enc, k)
    level = torch.cat(levels).view(torch.bfloat16)  # what was not found is below it
    rest = places(~((level <= pre.amin(1) + lift) & product.finite))  # not certain
    feature[rest] = _dense_top(x[rest], W_enc, b_enc, k)
    again = _each(feature[rest], None, len(W_enc))
    pre[rest] = _values(x[rest], W_enc, b_enc, again.token, again.feature, again.starts).view(len(rest), k)
    return _each(feature, pre, len(W_enc))


def _maxima(pre: Tensor, groups: int) -> Tensor:
    """The largest of each group of features at each token: `[tokens, groups]`."""
    size = len(pre) // groups
    return pre[: size * groups].unflatten(0, (size, groups)).amax(0).T


def _lift(product: Product, groups: int, k: int) -> Float[Tensor, ""]:
    """What to add to all pre-activations so that levels of nearly every token are above 0, as a comparison of bits
    needs; the order stays. Trained features are below 0 at most tokens.

    As much as all but 2 % need, where those are not far from the others: far above 0, bfloat16 is too coarse to tell
    features apart.
    """
    every = -(-len(product.x) // _SAMPLE)
    kth = torch.cat([kth_largest(_maxima(pre, groups).float(), k) for _, pre in product.chunks(every)])
    wanted = (3 * product.usual[::every] - kth).sort(descending=True).values
    most, many, half = (wanted[int(share * len(wanted))] for share in (0.02, 0.1, 0.5))
    return torch.minimum(most, half + _SPREAD * (many - half)).clamp_min(0)


def _flat(bits: Tensor, level: Tensor, start: int) -> Int[Tensor, " entries"]:
    """What reaches the level of its token or feature, of tokens from `start` on, as places in [tokens, n_features]."""
    return transposed(at_least(bits, level), *bits.shape, start=start)


def _each(feature: Int[Tensor, "tokens k"], pre: Float[Tensor, "tokens k"] | None, n_features: int) -> ActiveSet:
    """The set in which every token has these features."""
    token = torch.arange(len(feature), device=feature.device)[:, None].expand_as(feature).reshape(-1)
    return ActiveSet(token, feature.flatten(), len(feature), n_features, None if pre is None else pre.flatten())


def _values(x: Tensor, W_enc: Tensor, b_enc: Tensor, token: Tensor, feature: Tensor, starts: Tensor) -> Tensor:
    return dots(x, W_enc, token, feature, starts) + b_enc.index_select(0, feature)


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
    n, device = len(x), flat.device
    if not len(flat):
        return flat.new_zeros(n, k, dtype=torch.long), x.new_full((n, k), -torch.inf)
    token, feature = divided(flat, len(W_enc), size=n * len(W_enc))
    starts = torch.searchsorted(flat, torch.arange(0, n * len(W_enc), len(W_enc), dtype=flat.dtype, device=device))
    count = starts.diff(append=starts.new_tensor([len(flat)]))
    if (crowded := count > max(_CROWD * k, _FEW)).any():
        return _top_of_each(flat[~crowded[token]], x, W_enc, b_enc, k)
    values = _values(x, W_enc, b_enc, token, feature, starts)
    most = max(k, int(count.max()))
    padded = values.new_full((n, most), -torch.inf)
    shift = torch.arange(0, n * most, most, device=device) - starts
    place = shift.index_select(0, token).add_(torch.arange(len(flat), device=device))
    padded.view(-1).index_copy_(0, place, values)
    chosen = padded >= kth_largest(padded, k)[:, None]
    uneven = places(chosen.sum(1) != k)  # equals, or too few
    first = padded[uneven].topk(k, dim=1, sorted=False).indices
    chosen[uneven] = torch.zeros_like(chosen[uneven]).scatter_(1, first, True)
    at = places(chosen)
    entry = (at.view(n, k) - shift[:, None]).clamp_(max=len(flat) - 1)  # any, where there are too few
    return feature.index_select(0, entry.view(-1)).view(n, k), padded.view(-1).index_select(0, at).view(n, k)
