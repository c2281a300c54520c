"""Laws of the figures: streaming equals the definition on everything at once; known models give known values."""

from __future__ import annotations

import math

import pytest
import torch

from replacement.activation import JumpReLU
from replacement.errors import InputError
from replacement.evaluation import ReconstructionMeter, ReplacementMeter, evaluate_reconstruction, evaluate_replacement
from replacement.evaluation.reconstruction import ErrorMeter, FiringMeter
from tests.tiny import random_transcoder


def transcoder(layer: int = 0, *, skip: bool = False):
    return random_transcoder(
        layer=layer,
        read="mlp.hook_in",
        write="mlp.hook_out",
        n_features=24,
        d_model=6,
        activation=JumpReLU(torch.tensor(0.9)),
        skip=skip,
        seed=3,
    )


@pytest.mark.parametrize("skip", [False, True])
def test_streamed_reconstruction_equals_its_definition(skip: bool) -> None:
    """FVU, L0 and dead fraction over uneven batches are those of the concatenated set."""
    torch.manual_seed(0)
    dictionary = transcoder(skip=skip)
    x, y = torch.randn(100, 6), torch.randn(100, 6) + 5
    found = evaluate_reconstruction([dictionary], [([x[:7]], [y[:7]]), ([x[7:60]], [y[7:60]]), ([x[60:]], [y[60:]])])[0]
    with torch.no_grad():
        error = (dictionary(x) - y).double()
        fires = dictionary.encode(x) != 0
    assert found.fvu == pytest.approx(
        (error.square().sum() / (y.double() - y.double().mean(0)).square().sum()).item(), rel=1e-6
    )
    assert found.l0 == pytest.approx(fires.sum().item() / 100)
    assert found.dead == pytest.approx((~fires.any(0)).float().mean().item())
    assert (found.tokens, found.n_features, found.layer) == (100, 24, 0)
    assert found.dense == pytest.approx((fires.double().mean(0) > 0.1).double().mean().item())
    assert found.nmse == pytest.approx((error.square().sum() / y.double().square().sum()).item(), rel=1e-6)
    assert found.cosine == pytest.approx(torch.cosine_similarity(dictionary(x), y).mean().item(), rel=1e-5)


def test_densities_are_counted_in_logarithmic_bins() -> None:
    """Every living feature is in the bin of its rate, dead ones are apart, and nothing is lost between batches."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.0, 0.001, 0.01, 0.02, 0.1, 0.5, 1.0])
    activations = (torch.rand(1000, 7, generator=generator) < rates).float()
    meter = FiringMeter(7)
    for part in activations.split(170):
        meter.update(part)
    found, measured = meter.histogram(), activations.double().mean(0)
    assert found.dead == int((measured == 0).sum()) and sum(found.counts) + found.dead == 7
    for number, count in enumerate(found.counts):
        low, high = 10 ** found.edges[number], 10 ** found.edges[number + 1]
        inside = (measured >= low * (1 - 1e-9)) & (measured < high * (1 - 1e-9))
        assert count == int(inside.sum()) + int(number == len(found.counts) - 1) * int((measured == 1).sum())
    assert meter.figures().dense == pytest.approx((measured > 0.1).double().mean().item())


def test_an_approximation_that_is_zero_has_no_cosine_and_misses_all() -> None:
    meter = ErrorMeter()
    meter.update(torch.ones(3, 2), torch.zeros(3, 2))
    found = meter.figures()
    assert found.cosine == 0 and found.nmse == 1 and math.isnan(found.fvu), "what does not vary has no variance"


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
def test_the_variance_of_small_changes_about_a_large_mean_is_exact(offset: float) -> None:
    """However it is batched, empty batches among them: nothing large is subtracted from something as large."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(1000, 5, generator=generator, dtype=torch.float64) + offset * torch.randn(5, generator=generator)
    ours = y + 0.1 * torch.randn(1000, 5, generator=generator)
    expected = ((y - ours).square().sum() / (y - y.mean(0)).square().sum()).item()
    for sizes in ([1000], [1, 0, 499, 500], [0, 7] + [331] * 3):
        meter = ErrorMeter()
        for one, other in zip(y.split(sizes), ours.split(sizes), strict=True):
            meter.update(one, other)
        found = meter.figures().fvu
        assert math.isnan(found) if offset == 1e7 else found == pytest.approx(expected, rel=1e-9)


def test_activations_that_differ_by_rounding_alone_have_no_fvu() -> None:
    """A constant is one too where its mean over a batch is rounded, or where batches round it differently."""
    for scale in (1e-3, 0.1, 3e5):
        meter, constant = ErrorMeter(), scale * (torch.rand(1, 64, generator=torch.Generator().manual_seed(1)) + 0.1)
        for number, size in enumerate((3, 64, 7)):
            meter.update((constant * (1 + number * 6e-8)).expand(size, 64), torch.zeros(size, 64))
        found = meter.figures()
        assert math.isnan(found.fvu) and found.nmse == pytest.approx(1)


def test_a_perfect_dictionary_has_no_unexplained_variance() -> None:
    dictionary, x = transcoder(), torch.randn(50, 6)
    with torch.no_grad():
        found = evaluate_reconstruction([dictionary], [([x], [dictionary(x)])])[0]
    assert found.fvu < 1e-9


def test_the_original_in_place_of_the_replaced_model_is_perfect() -> None:
    """Top-1 agreement and CE recovered are 1 and KL is 0 for the model itself; CE recovered is 0 for the ablated
    model.
    """
    torch.manual_seed(0)
    table, other = torch.randn(9, 9), torch.randn(9, 9)
    tokens = torch.randint(9, (4, 11))
    batches = [(tokens, tokens > 4)]
    same = evaluate_replacement(lambda t: table[t], lambda t: table[t], lambda t: other[t], batches)
    for figures in same.values():
        assert (
            figures.top1 == 1 and figures.kl == pytest.approx(0, abs=1e-12) and figures.ce_recovered == pytest.approx(1)
        )
    assert same["all"].tokens == 40 and same["answer"].tokens == (tokens[:, 1:] > 4).sum()
    assert evaluate_replacement(lambda t: table[t], lambda t: other[t], lambda t: other[t], batches)[
        "all"
    ].ce_recovered == pytest.approx(0)


def test_divergence_and_losses_equal_their_definitions() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(3, 20, 5), torch.randint(5, (20,))
    meter = ReplacementMeter()
    meter.update(*(part[:13] for part in logits), targets[:13])
    meter.update(*(part[13:] for part in logits), targets[13:])
    found, p = meter.figures(), logits.double().softmax(-1)
    assert found.kl == pytest.approx((p[0] * (p[0] / p[1]).log()).sum(-1).mean().item())
    assert found.ce_replaced == pytest.approx(-p[1][torch.arange(20), targets].log().mean().item())
    assert found.top1 == pytest.approx((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item())


def test_an_empty_evaluation_is_an_error() -> None:
    with pytest.raises(InputError, match="got no tokens"):
        ReplacementMeter().figures()
    with pytest.raises(InputError, match="got no tokens"):
        ReconstructionMeter(transcoder()).figures()
