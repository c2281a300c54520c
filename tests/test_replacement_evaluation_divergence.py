"""The divergence of two models divided among features of a crosscoder: against brute force, and laws of the parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from replacement.activation import ReLU
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.evaluation.divergence import DivergenceMeter

PARTS = ("base:blocks.1.hook_resid_post", "tuned:blocks.1.hook_resid_post")
WIDTH, FEATURES, WORDS, DOCUMENTS, POSITIONS = 8, 5, 11, 3, 6


def crosscoder(W_dec: Tensor, W_enc: Tensor, parts: tuple[str, ...] = PARTS) -> Crosscoder:
    return Crosscoder(
        parts=parts,
        site="hook_resid_post",
        W_enc=W_enc,
        b_enc=torch.zeros(len(W_enc)).to(W_enc),
        W_dec=W_dec,
        b_dec=0.1 * torch.arange(2 * WIDTH).to(W_dec).view(2, WIDTH).sin(),
        activation=ReLU(),
    )


class Random:
    """A random crosscoder, two models' activations, and a way on that mixes positions and bends, all in float64."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.one = crosscoder(
            torch.randn(FEATURES, 2, WIDTH, generator=draw).double(),
            torch.randn(FEATURES, 2 * WIDTH, generator=draw).double(),
        )
        self.first, self.second = (torch.randn(DOCUMENTS, POSITIONS, WIDTH, generator=draw).double() for _ in range(2))
        self.first[:, 0] = self.second[:, 0] + 0.1
        self.keep = torch.ones(DOCUMENTS, POSITIONS, dtype=torch.bool)
        self.keep[:, 0] = False
        self.W = torch.randn(WIDTH, WORDS, generator=draw).double()

    def go_on(self, x: Tensor) -> Tensor:
        mixed = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x)[:, None]  # later positions see earlier ones
        return (x + mixed.tanh()) @ self.W

    def kl(self, x: Tensor) -> Tensor:
        """Sum over the tokens that count, from its definition."""
        p, q = (self.go_on(h)[self.keep].softmax(-1) for h in (self.second, x))
        return (p * (p / q).log()).sum()

    def integral(self, direction: Tensor, steps: int) -> float:
        """What a direction adds along the path, by central differences of the divergence itself."""
        total, h = 0.0, 1e-5
        for step in range(steps):
            x = self.first + (step + 0.5) / steps * (self.second - self.first)
            total -= float(self.kl(x + h * direction) - self.kl(x - h * direction)) / (2 * h) / steps
        return total / int(self.keep.sum())


@pytest.fixture
def random() -> Random:
    return Random()


def measured(given: Random, **settings: int) -> DivergenceMeter:
    meter = DivergenceMeter(given.one, **settings)
    for rows in (slice(0, 2), slice(2, 3)):  # streamed
        meter.add(given.first[rows], given.second[rows], given.keep[rows], given.go_on)
    return meter


def test_parts_are_derivatives_along_the_path_one_feature_at_a_time(random: Random) -> None:
    found = measured(random, steps=4).result()
    x = torch.cat([random.first, random.second], -1)
    fired = random.one.encode(x).detach() * random.keep[..., None]
    rows, bias = random.one.W_dec.detach(), random.one.b_dec.detach()
    for j in range(FEATURES):
        wanted = random.integral(fired[..., j, None] * (rows[j, 1] - rows[j, 0]), steps=4)
        assert found.features[j].item() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    biases = random.keep[..., None] * (bias[1] - bias[0])
    assert found.bias == pytest.approx(random.integral(biases, steps=4), rel=1e-6)
    written = fired @ (rows[:, 1] - rows[:, 0]) + biases
    assert found.error == pytest.approx(random.integral(random.second - random.first - written, steps=4), rel=1e-6)


def test_all_parts_add_up_to_the_divergence(random: Random) -> None:
    coarse, fine = (measured(random, steps=steps).result() for steps in (4, 64))
    tokens = int(random.keep.sum())
    for found in (coarse, fine):
        assert found.tokens == tokens and found.total == pytest.approx(float(random.kl(random.first)) / tokens)
        parts = float(found.features.sum()) + found.bias + found.error + found.residual
        assert parts == pytest.approx(found.total)
    assert abs(fine.residual) < 1e-3 * fine.total < abs(coarse.residual) < 0.1 * coarse.total


def test_a_feature_that_no_prediction_hangs_on_has_no_part() -> None:
    """What is written otherwise where nothing reads it counts for nothing, however much it is."""
    axes = torch.eye(WIDTH)
    W_dec = torch.stack([axes[[0, 4, 2]]] * 2, 1)
    W_dec[0, 1] = axes[1]  # a word for another
    W_dec[1, 1] = 50 * axes[5]  # read by nothing
    W_enc = torch.cat([axes[[0, 4, 2]], torch.zeros(3, WIDTH)], 1)  # read from the first model
    one = crosscoder(W_dec, W_enc)
    f = torch.rand(1, 40, 3, generator=torch.Generator().manual_seed(3))
    first, second = f @ W_dec[:, 0], f @ W_dec[:, 1]
    words = 5 * axes[:, :4]
    meter = DivergenceMeter(one)
    meter.add(first, second, torch.ones(1, 40, dtype=torch.bool), lambda x: x @ words)
    found = meter.result()
    assert found.features[1:].tolist() == [0, 0] and found.features[0] > 0.1
    assert abs(float(found.features[0]) - found.total) < 0.02 * found.total


def test_equal_models_do_not_diverge(random: Random) -> None:
    meter = DivergenceMeter(random.one)
    meter.add(random.first, random.first, random.keep, random.go_on)
    found = meter.result()
    assert max(abs(found.total), abs(found.error), float(found.features.abs().max())) < 1e-12


def test_mistakes_are_named(random: Random) -> None:
    with pytest.raises(InputError, match="was given no token"):
        DivergenceMeter(random.one).result()
    with pytest.raises(InputError, match=r"steps=0\): needs at least 1"):
        DivergenceMeter(random.one, steps=0)
    layers = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    alone = crosscoder(random.one.W_dec.detach(), random.one.W_enc.detach(), layers)
    with pytest.raises(InputError, match=r"has the parts blocks.1.hook_resid_post, .* needs a site of two models"):
        DivergenceMeter(alone)
