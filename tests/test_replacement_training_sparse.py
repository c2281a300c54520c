"""Laws of the sparse kernels: what they choose is what the dense product would choose, and values, sums and all
gradients equal those of plain matrix products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from replacement.encoding import Kronecker
from replacement.training.sparse import (
    ActiveSet,
    bounds,
    choice,
    decode_active,
    encode_active,
    pairs_above,
    search,
    select_above,
    select_top,
)
from replacement.training.sparse.products import dots

SIZES = [  # tokens, d_in, n_features, k: candidates by groups, small enough for the plain way, odd widths, k too large
    (37, 24, 4096, 32),
    (300, 24, 1024, 5),
    (300, 24, 1000, 5),
    (50, 8, 30, 7),
    (9, 5, 24, 40),
    (0, 5, 1024, 4),
]


def weights(n_tokens: int, d_in: int, n_features: int, *, seed: int = 0, dtype=torch.float32, shift: float = -1.0):
    """Random inputs (one zero, one long, one all equal), encoder rows and biases."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, d_in, dtype=dtype, generator=generator)
    if n_tokens > 5:
        x[0], x[5] = 0, -1
        x[1] *= 100
    W_enc = torch.randn(n_features, d_in, dtype=dtype, generator=generator)
    return x, W_enc, torch.randn(n_features, dtype=dtype, generator=generator) + shift


def flat(active: ActiveSet) -> torch.Tensor:
    return active.token * active.n_features + active.feature


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_the_top_of_each_token_is_the_dense_top(size, dtype, native, monkeypatch) -> None:
    """Candidates lose none of the k largest, whether the processor multiplies in bfloat16 or only the result is rounded
    to it, and whoever searches; negative ones count where few are positive."""
    monkeypatch.setattr(bounds, "multiplies_bfloat16", lambda device: native)
    monkeypatch.setattr(search, "_by_numpy", lambda x: native)
    *shape, k = size
    for shift in (-1.0, -8.0):
        x, W_enc, b_enc = weights(*shape, dtype=dtype, shift=shift)
        pre = x @ W_enc.T + b_enc
        active = select_top(x, W_enc, b_enc, k)
        expected = pre.topk(min(k, shape[2])).indices.sort().values
        assert torch.equal(active.feature.view(expected.shape), expected)
        assert torch.equal(active.token, torch.arange(shape[0]).repeat_interleave(min(k, shape[2])))
        if active.pre is not None:
            torch.testing.assert_close(active.pre, pre.flatten()[flat(active)], rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3), spread=st.floats(0, 3), k=st.integers(1, 16))
def test_rounding_never_costs_a_feature(seed: int, scale: float, spread: float, k: int) -> None:
    """The margin covers bfloat16 for rows of any length and for near ties: what is chosen is within float32 rounding
    of the k largest."""
    x, W_enc, b_enc = weights(20, 16, 512, seed=seed, shift=0.0)
    W_enc = (W_enc[:1] + 1e-3 * W_enc) if seed % 3 == 0 else W_enc
    W_enc = W_enc * scale * torch.logspace(-spread, spread, 512).unsqueeze(1)
    pre = x @ W_enc.T + b_enc
    chosen = pre.flatten()[flat(select_top(x, W_enc, b_enc, k))].view(20, k).sort(descending=True).values
    torch.testing.assert_close(chosen, pre.topk(k).values, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("length", [1.0, 3000.0])
def test_a_few_tokens_at_which_all_is_off_do_not_lift_all(length: float, monkeypatch) -> None:
    """Far above 0, bfloat16 could not tell the other tokens' features apart, and nearly all would be candidates."""
    dense, taken = choice._dense_top, []
    monkeypatch.setattr(choice, "_dense_top", lambda x, *rest: (taken.append(len(x)), dense(x, *rest))[1])
    x, W_enc, b_enc = weights(640, 24, 1024, shift=-20.0)
    W_enc[:, 0] = W_enc[:, 0].abs() + 1
    x[10::23] = 0  # also of those that are looked at
    x[10::23, 0] = -length
    active = select_top(x, W_enc, b_enc, 4)
    values = (x @ W_enc.T + b_enc).flatten()[flat(active)].view(640, 4).sort(descending=True).values
    torch.testing.assert_close(values, (x @ W_enc.T + b_enc).topk(4).values)
    assert sum(taken) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_beyond_bfloat16_are_chosen_by_the_plain_product(dtype) -> None:
    """An infinite weight times an input of 0 is no number, which is below every level."""
    x, W_enc, b_enc = weights(40, 24, 1024, dtype=dtype)
    x, W_enc[7] = x.abs(), 5
    x[:, 0], W_enc[7, 0] = 0, 3.4e38 if dtype == torch.float32 else 1e300
    expected = (x @ W_enc.T + b_enc).topk(4).indices.sort().values
    assert (expected[1:] == 7).any(1).all()
    assert torch.equal(select_top(x, W_enc, b_enc, 4).feature.view(40, 4)[1:], expected[1:])


def test_comparing_bits_is_comparing_positive_floats() -> None:
    pre = torch.randn(33, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    pre[0, 0], pre[0, 1], pre[0, 2] = torch.tensor(0.8), -torch.inf, torch.inf
    above = (pre > torch.tensor(0.8).bfloat16()).flatten().nonzero().flatten()
    assert torch.equal(search.at_least(search.as_bits(pre), search.level_above(torch.tensor(0.8))), above)
    above = (pre > torch.linspace(0.1, 2, 33).bfloat16()[:, None]).flatten().nonzero().flatten()
    of_rows = search.level_above(torch.linspace(0.1, 2, 33))[:, None]
    assert torch.equal(search.at_least(search.as_bits(pre), of_rows), above)
    levels = torch.linspace(-1, 2, 50)
    found = torch.zeros_like(pre, dtype=torch.bool).flatten()
    found[search.at_least(search.as_bits(pre), search.level_below(levels))] = True
    found, far = found.view(33, 50), levels * (1 - 2.0**-7)
    assert found[(pre >= levels) & (levels > 0)].all() and (pre >= far)[found].all()
    assert not found[:, levels <= 0].any()


@pytest.mark.parametrize("numpy", [True, False])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])
def test_sorting_and_searching_are_torchs(dtype, numpy, monkeypatch) -> None:
    """Whoever does it: with repeated numbers, and where there is nothing."""
    monkeypatch.setattr(search, "_by_numpy", lambda x: numpy)
    numbers = torch.randint(-9, 9, (6, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(search.kth_largest(numbers, 3), numbers.sort(dim=1, descending=True).values[:, 2])
    assert torch.equal(search.kth_largest(numbers.T, 6), numbers.T.amin(1))
    assert torch.equal(search.places(numbers > 0), (numbers > 0).flatten().nonzero().flatten())
    if not dtype.is_floating_point:
        assert torch.equal(search.ascending(numbers.flatten()), numbers.flatten().sort().values)
        for size in (100, 1 << 40):
            quotient, remainder = search.divided(numbers.flatten().abs(), 4, size=size)
            assert torch.equal(quotient * 4 + remainder, numbers.flatten().abs().long())
            assert remainder.min() >= 0 and remainder.max() == 3
        assert not len(search.ascending(numbers[:0].flatten())) and not len(search.places(numbers[:0] > 0))
    place = search.places(numbers > 0)
    for rows in (3, 1 << 33):  # of the transpose, further down than 32 bits reach
        swapped = torch.zeros(20 + rows, 6, dtype=torch.bool) if rows == 3 else None
        found = search.transposed(place, 6, 20, start=rows)
        if swapped is not None:
            swapped[rows:] = (numbers > 0).T
            assert torch.equal(found.long().sort().values, swapped.flatten().nonzero().flatten())
        assert torch.equal(found.long() // 6 - rows, place % 20) and torch.equal(found.long() % 6, place // 20)


def test_selection_is_the_comparison_with_the_threshold() -> None:
    """But for what lies within rounding of it, and however many tokens are multiplied at once."""
    x, W_enc, b_enc = weights(601, 24, 8192)
    x[1] /= 100
    pre, margin = x @ W_enc.T + b_enc, 2.0**-7 * x.norm(dim=1, keepdim=True) * W_enc.norm(dim=1)
    for thresholds in (1.0, torch.linspace(0.2, 3, 8192)):
        active = select_above(x, W_enc, b_enc, thresholds)
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        chosen[active.token, active.feature] = True
        clear = (pre - thresholds).abs() > margin + 2.0**-7 * thresholds
        assert clear.float().mean() > 0.9
        assert torch.equal(chosen[clear], (pre > thresholds)[clear])
        assert torch.equal(flat(active), flat(active).sort().values)
        assert (active.n_tokens, active.n_features) == (601, 8192)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-2, 1e2), mean=st.sampled_from([0.0, 3.0, 1e6]))
def test_no_result_is_below_the_exact_one(seed: int, scale: float, mean: float) -> None:
    """Not even once it is rounded, as the exact one would be; nor further above it than twice the bound on errors. Also
    where biases all but cancel what tokens share."""
    x, W_enc, b_enc = weights(24, 40, 64, seed=seed, shift=0.0)
    x, W_enc, b_enc = x + mean, W_enc * scale, b_enc * (100 if seed % 2 else 1)
    W_enc[:8] *= 100
    b_enc = b_enc - mean * W_enc.sum(1)
    product = bounds.Product(x, W_enc, b_enc, bounded=True)
    ((_, pre),) = product.chunks()
    exact, rounding = (x.double() @ W_enc.double().T + b_enc).T, pre.double().abs() * 2.0**-8 * 1.01
    of_bias = b_enc.abs() * 2.0**-12 + mean * 40 * W_enc.abs().amax(1) * 2.0**-10
    bound = product.W[:, 42:44].double() @ product.x[:, 42:44].double().T + of_bias[:, None]
    assert (pre >= exact.bfloat16()).all() and (pre.double() - exact <= 2 * bound + rounding).all()


@pytest.mark.parametrize("ratio", [6, 60])
def test_what_all_tokens_share_costs_nothing(ratio: float, monkeypatch) -> None:
    """Residual streams have means several times their spread; a few very long tokens among them change nothing."""
    dense, taken = choice._dense_top, []
    monkeypatch.setattr(choice, "_dense_top", lambda x, *rest: (taken.append(len(x)), dense(x, *rest))[1])
    x, W_enc, b_enc = weights(600, 64, 4096)
    mean = ratio * x[7:8]
    x, b_enc = x + mean, b_enc - 5 - (W_enc @ mean.T).flatten()
    x[2::50] *= 300
    pre = x.double() @ W_enc.double().T + b_enc
    chosen = pre.flatten()[flat(select_top(x, W_enc, b_enc, 16))].view(600, 16).sort(descending=True).values
    torch.testing.assert_close(chosen, pre.topk(16).values, rtol=1e-5, atol=1e-4 * ratio)
    assert sum(taken) < 100


@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_the_choice_at_a_token_does_not_depend_on_the_others(mean: float) -> None:
    """Processes that share a batch choose as one that has all of it: nothing that decides is drawn from the batch."""
    x, W_enc, b_enc = weights(601, 64, 4092, shift=-20.0)
    x = x + mean
    levels = torch.full((4092 // 6 * 8,), 3.0)
    for choose in (
        lambda x: select_above(x, W_enc, b_enc, 1.0),
        lambda x: pairs_above(x, W_enc, b_enc, levels, Kronecker(2, 4)),
        lambda x: select_top(x, W_enc, b_enc, 16),
    ):
        whole, parts = choose(x), [choose(x[start::2]) for start in (0, 1)]
        among = torch.cat(
            [(2 * part.token + start) * part.n_features + part.feature for start, part in enumerate(parts)]
        )
        assert len(among) > 1000 and torch.equal(among.sort().values, flat(whole))


def test_what_rounding_takes_from_a_bias_is_in_the_bound() -> None:
    """Large ones that inputs all but cancel, exactly: what is left is smaller than what bfloat16 loses of them."""
    left = torch.randn(512, generator=torch.Generator().manual_seed(0))
    x, W_enc = torch.zeros(24, 40), torch.zeros(512, 40)
    x[:, 0], W_enc[:, 0] = 1, -1000
    b_enc = 1000 + left
    product = bounds.Product(x, W_enc, b_enc, bounded=True)
    ((_, pre),) = product.chunks()
    exact = (b_enc.double() - 1000)[:, None]
    assert (pre >= exact.bfloat16()).all() and (pre.double() - exact).max() < 1000 * 2.0**-9


@pytest.mark.parametrize("shift", [-1.0, -40.0])
@pytest.mark.parametrize("factor", [1.0, 10.0, 1000.0])
def test_a_few_long_rows_do_not_send_all_tokens_to_the_plain_product(factor: float, shift: float, monkeypatch) -> None:
    """What rounding does to them says nothing of the others."""
    x, W_enc, b_enc = weights(512, 64, 4096, shift=shift)
    W_enc[:20] *= factor
    dense, taken = choice._dense_top, []
    monkeypatch.setattr(choice, "_dense_top", lambda x, *rest: (taken.append(len(x)), dense(x, *rest))[1])
    active = select_top(x, W_enc, b_enc, 16)
    values = (x @ W_enc.T + b_enc).flatten()[flat(active)].view(512, 16).sort(descending=True).values
    torch.testing.assert_close(values, (x @ W_enc.T + b_enc).topk(16).values)
    assert sum(taken) < 100


@pytest.mark.parametrize("rounded", ["inputs", "weights", "both"])
@pytest.mark.parametrize(("exponent", "shift"), [(0, 0), (-22, 0), (-30, 0), (0, -4)])
def test_what_bfloat16_puts_in_the_wrong_order_is_chosen_right(
    rounded: str, exponent: int, shift: int, monkeypatch
) -> None:
    """Four features that rounding takes far below twenty others, which it leaves as they are: at a third of the tokens
    the exact values of the candidates cannot tell, and the bound must. Also where squares of the errors underflow, and
    where all are below 0."""
    monkeypatch.setattr(bounds, "multiplies_bfloat16", lambda device: True)
    low, high, d, n_features, k = 1 + 0.99 * 2**-8, 1 + 1.01 * 2**-8, 64, 4096, 4
    order = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))
    under, fake = order[:k], order[k : 6 * k]
    x, W_enc, b_enc = torch.ones(40, d), torch.zeros(n_features, d), torch.full((n_features,), -1.0)
    W_enc[under, :32], W_enc[fake, 32:] = low if rounded == "weights" else 1.0, 1.0
    b_enc[under], b_enc[fake] = -31.5, -31.42
    if rounded != "weights":
        x[:, :32] = low
    if rounded == "both":
        x[:, 32:], b_enc[fake] = high, -31.5
        W_enc[fake, 40] = W_enc[fake, 41] = 0.99609375
    x, b_enc = x * 10.0**exponent, (b_enc + shift) * 10.0**exponent
    x = torch.cat([x, 0 * x, -x])  # which share nothing
    expected = (x[:40].double() @ W_enc.double().T + b_enc).topk(k).indices.sort().values
    assert torch.equal(expected[0], under.sort().values)
    assert torch.equal(select_top(x, W_enc, b_enc, k).feature.view(-1, k)[:40], expected)


def test_equals_all_above_the_rest_are_chosen_from(monkeypatch) -> None:
    """A thousand copies of one feature, all first: each token gets k of them, and none keeps that many candidates."""
    x, W_enc, b_enc = weights(300, 24, 2048, shift=0.0)
    x = x.abs() + 0.1
    W_enc[:1000], b_enc[:1000] = 100.0, 0.0
    kth_largest, widths = choice.kth_largest, []
    monkeypatch.setattr(
        choice, "kth_largest", lambda x, k: (widths.append(x.shape[1] * (len(x) == 300)), kth_largest(x, k))[1]
    )
    active = select_top(x, W_enc, b_enc, 4)
    assert (active.feature < 1000).all() and len(active.feature) == 1200
    assert (flat(active).diff() > 0).all() and max(widths) <= 64


def test_values_that_the_choice_took_are_taken_over() -> None:
    """Pre-activations, and gradients to everything, are those of an encoding that knows nothing."""
    tensors = [each.requires_grad_() for each in weights(30, 24, 2048, shift=0.0)]
    active = select_top(*(each.detach() for each in tensors), 4)
    assert active.pre is not None
    values = [encode_active(*tensors, active, known) for known in (active.pre, None)]
    torch.testing.assert_close(*values)
    upstream = torch.randn(len(active.feature), generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad(each, tensors, upstream) for each in values), strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_by_feature_is_the_transposed_set() -> None:
    """`by_feature` lists the entries by feature, then token, with each feature's beginning."""
    active = select_top(*weights(40, 8, 256), 3)
    order, token, starts = active.by_feature
    keys = active.feature[order] * 40 + token
    assert torch.equal(keys, keys.sort().values)
    assert torch.equal(
        torch.diff(starts, append=torch.tensor([len(order)])), torch.bincount(active.feature, minlength=256)
    )


def dense(x, W_enc, b_enc, W_dec, active, prefixes):
    """The three-line meaning of `decode_active` after `encode_active`."""
    mask = torch.zeros(active.n_tokens, active.n_features, dtype=x.dtype)
    mask[active.token, active.feature] = 1
    values = (x @ W_enc.T + b_enc) * mask
    return torch.stack([values[:, :p] @ W_dec[:p] for p in (*prefixes, active.n_features)], 1)


def sparse(x, W_enc, b_enc, W_dec, active, prefixes):
    return decode_active(encode_active(x, W_enc, b_enc, active), W_dec, active, prefixes)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("prefixes", [(), (8,), (3, 10)])
def test_sparse_decoding_equals_dense_with_all_gradients(prefixes, mkl, monkeypatch) -> None:
    """The kernels are an optimisation: outputs and every gradient agree with plain matrix products in float64."""
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.manual_seed(0)
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((11, 5), (24, 5), (24,), (24, 7))]
    active = select_above(*tensors[:3], 0.7)
    sides = []
    for decode in (sparse, dense):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = decode(*leaves, active, prefixes)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        sides.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, plain in zip(*sides, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("prefixes", [(), (3, 10)])
def test_gradients_pass_gradcheck(prefixes: tuple[int, ...]) -> None:
    """Encoding and decoding each, against finite differences."""
    torch.manual_seed(0)
    x, W_enc, b_enc, W_dec = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (16, 3), (16,), (16, 2)))
    active = select_top(x, W_enc, b_enc, 3)
    values = torch.randn(12, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, W_enc, b_enc, values, W_dec)]
    assert torch.autograd.gradcheck(lambda *a: encode_active(*a, active), tuple(leaves[:3]))
    assert torch.autograd.gradcheck(lambda v, w: decode_active(v, w, active, prefixes), tuple(leaves[3:]))


def test_no_gradient_is_made_that_nobody_asked_for() -> None:
    """A frozen decoder or input costs nothing and gets None."""
    x, W_enc, b_enc = weights(20, 8, 128)
    W_enc.requires_grad_()
    active = select_top(x, W_enc, b_enc, 3)
    W_dec = torch.randn(128, 8)
    decode_active(encode_active(x, W_enc, b_enc, active), W_dec, active).sum().backward()
    assert W_enc.grad is not None and x.grad is None and b_enc.grad is None and W_dec.grad is None


def test_gradients_of_gradients_are_refused() -> None:
    """A GPU's kernels have none, so they would be silently wrong there; the CPU says the same."""
    x, W_enc, b_enc = weights(20, 8, 128)
    W_enc.requires_grad_()
    out = encode_active(x, W_enc, b_enc, select_top(x, W_enc, b_enc, 3)).square().sum()
    (grad,) = torch.autograd.grad(out, W_enc, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_empty_set_writes_nothing_and_gives_zero_gradients() -> None:
    """Early in training nothing may fire."""
    x, W_enc, b_enc = (t.requires_grad_() for t in weights(6, 4, 64))
    W_dec = torch.randn(64, 3, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    out = sparse(x, W_enc, b_enc, W_dec, ActiveSet(none, none, 6, 64), (8,))
    out.sum().backward()
    assert out.shape == (6, 2, 3) and not out.any()
    for leaf in (x, W_enc, b_enc, W_dec):
        assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [11, 12, 13, 60])
def test_a_place_may_be_asked_for_more_than_once(entries: int, dtype: torch.dtype) -> None:
    """As Kronecker encoders do, a row once for each of its pairs: also for more entries than the 12 places there are,
    which a sparse pattern of torch cannot hold."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, dtype=dtype, generator=generator) for n in (4, 3))
    row = torch.randint(4, (entries,), generator=generator).sort().values
    column = torch.randint(3, (entries,), generator=generator)
    torch.testing.assert_close(dots(a, b, row, column), (a[row] * b[column]).sum(1))


def test_values_are_the_pre_activations_of_the_active() -> None:
    """In the precision of the weights, whatever the choice was made by."""
    x, W_enc, b_enc = weights(30, 24, 1024)
    active = select_top(x, W_enc, b_enc, 4)
    expected = F.linear(x, W_enc, b_enc)[active.token, active.feature]
    torch.testing.assert_close(encode_active(x, W_enc, b_enc, active), expected, rtol=1e-5, atol=1e-4)
