"""Penalties come to the wanted L0, also where a weight alone does not bring them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from replacement.training import EndToEndConfig, TokenBatch, Trainee, plans, train, train_end_to_end
from replacement.training.parallel import ALONE
from replacement.training.sparse import ActiveSet
from replacement.training.sparsity.penalties import ReLUSparsity
from tests.test_replacement_training import ToyModel, toy_trainee
from tests.test_replacement_training_kinds import N_LAYERS, Planted, config, start

PENALTIES: dict[str, dict[str, Any]] = {
    "relu": {"sparsity": "relu"},
    "jumprelu": {"sparsity": "jumprelu"},
    "jumprelu quadratic": {"sparsity": "jumprelu", "penalty": "quadratic"},
    "gated": {"sparsity": "gated"},
}
SIZES: dict[str, dict[str, Any]] = {
    "many of few": {"kind": "transcoder", "n_features": 48, "k": 16},
    "few of few": {"kind": "crosscoder", "n_features": 64, "k": 1},
}


def l0(trainee: Trainee, source: Planted) -> list[float]:
    """Features that fire at a token of batches that training has not seen, in every finished dictionary.

    Several, as planted features fire together by chance: L0 of a single one is off by 4 % where k is 1.
    """
    batches = [source.batch(10_000 + index) for index in range(8)]
    batch = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    found = zip(trainee, trainee.dictionaries(), strict=True)
    read = [(one, torch.cat([batch[name] for name in coder.plan.reads], 1)) for coder, one in found]
    return [(one.encode(x) != 0).sum().item() / len(x) for one, x in read]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_l0_is_reached_whatever_k_is_to_the_number_of_features(penalty: str, size: str) -> None:
    """By every dictionary, to within 10 % on tokens that it has not seen: a third of all features, and one of 64."""
    given = config(batch_tokens=256, tokens=100 * 256, **SIZES[size], **PENALTIES[penalty])
    planned = plans(given, N_LAYERS)
    source = Planted(planned)
    trainee = train(source, planned, config=given, show_progress=False)
    assert l0(trainee, source) == pytest.approx([given.k] * len(planned), rel=0.1)


@pytest.mark.parametrize("shift", [-0.3, 0.3])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_l0_is_brought_to_k_from_either_side_without_an_optimiser(penalty: str, shift: float) -> None:
    """Too few or too many fire; neither a gradient nor a learning rate is needed to change that."""
    trainee, source = start(config(n_features=48, **PENALTIES[penalty]))
    for coder in trainee:
        coder.b_enc.data.add_(shift)
    small = [{name: x[:256] for name, x in source.batch(index).items()} for index in range(4)]
    for step in range(80):
        trainee(small[step % 4], generator=torch.Generator().manual_seed(0), memory=1.0)
        trainee.nudge()
    assert l0(trainee, source) == pytest.approx([4, 4], rel=0.1)


def test_layers_that_do_not_learn_are_not_moved() -> None:
    """As in the end-to-end stage of a few layers."""
    trainee, source = start(config(sparsity="jumprelu"))
    first, second = trainee
    first.requires_grad_(False)
    before = [coder.b_enc.clone() for coder in trainee]
    trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=1.0)
    trainee.nudge()
    assert torch.equal(first.b_enc, before[0])
    assert not torch.equal(second.b_enc, before[1])


def test_the_end_to_end_stage_holds_l0_too() -> None:
    """Without a learning rate biases move all the same, those of the layers that learn."""
    trainee, _ = toy_trainee(sparsity="relu")
    tokens = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(0))
    before = [coder.b_enc.clone() for coder in trainee]
    stage = EndToEndConfig(steps=1, learning_rate=0.0, layers=(1,), bridging_weight=1.0)
    batch = TokenBatch(tokens, tokens > 6)
    train_end_to_end(ToyModel(), trainee, lambda _: batch, config=stage, show_progress=False)
    first, second = (coder.b_enc - b for coder, b in zip(trainee, before, strict=True))
    assert not first.any()
    assert second.any() and torch.allclose(second, next(coder.sparsity.due for coder in trainee if coder.layer == 1))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_dictionary_that_fell_silent_comes_back(penalty: str) -> None:
    """There is no density to count; biases rise by a share of the distance that features last had from where they
    begin to fire."""
    trainee, source = start(config(n_features=48, **PENALTIES[penalty]))
    small = {name: x[:128] for name, x in source.batch(1).items()}

    def step() -> float:
        found = trainee(small, generator=torch.Generator().manual_seed(0), memory=1.0, with_dead=False)
        trainee.nudge()
        return found.l0.min().item()

    step()
    for coder in trainee:
        coder.b_enc.data.sub_(12 * coder.sparsity.distance)
    silent = 0
    while (fires := step()) == 0:
        silent += 1
        assert silent < 1000
    assert silent > 50 and fires < 0.5


def test_a_gate_that_opens_on_nothing_is_not_what_fires() -> None:
    """Where magnitudes are below zero no feature fires, however far gates are open: distance is to both, and what is
    due is no more than a tenth of what features were last above it."""
    trainee, source = start(config(n_features=48, sparsity="gated"))
    batch, generator = source.batch(1), torch.Generator().manual_seed(0)
    trainee(batch, generator=generator, memory=1.0)
    usual = [coder.sparsity.distance.item() for coder in trainee]
    for coder in trainee:
        coder.sparsity.b_mag.data.sub_(6.0)
    for _ in range(50):
        trainee(batch, generator=generator, memory=1.0)
        trainee.nudge()
        for coder, distance in zip(trainee, usual, strict=True):
            assert coder.sparsity.due <= coder.sparsity.near * distance


def test_what_is_due_is_a_damped_newton_step_within_what_is_seen() -> None:
    """`rate (wanted - fires) / density`, no further down than density is counted, and up by a tenth of that."""
    sparsity = ReLUSparsity(config(sparsity="relu", k=4), ALONE)
    above = torch.linspace(0.001, 1.0, 1000)  # of one feature a token on average: a density of 1 everywhere
    active = ActiveSet(torch.arange(1000), torch.zeros(1000, dtype=torch.int32), 1000, 48)
    near = 0.2 * above.mean().item()
    for wanted, due in {1.0: 0.0, 1.1: 0.005, 0.9: -0.005, 3.0: 0.1 * near, -9.0: -near}.items():
        sparsity.aim(above, active, fires=torch.tensor(1.0), wanted=torch.tensor(wanted))
        assert sparsity.due.item() == pytest.approx(due, rel=0.02, abs=1e-6)


def test_a_gate_and_its_magnitude_are_moved_together() -> None:
    """A feature fires where its gate opens, before and after: thresholds of the magnitudes stay below."""
    trainee, source = start(config(n_features=48, sparsity="gated"))
    for coder in trainee:
        coder.sparsity.r_mag.data.uniform_(-0.5, 0.5)
    trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=1.0)
    before = [(coder.b_enc.clone(), coder.sparsity.b_mag.clone()) for coder in trainee]
    for coder, (gate, magnitude) in zip(trainee, before, strict=True):
        coder.sparsity.due.fill_(0.3)
        coder.sparsity.nudge(coder.b_enc)
        torch.testing.assert_close(coder.b_enc, gate + 0.3)
        torch.testing.assert_close(coder.sparsity.b_mag, magnitude + 0.3 * coder.sparsity.r_mag.exp())
