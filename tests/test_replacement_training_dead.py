"""Laws of the remedies for dead features: the published formulas, their weight in a run, when features start again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from replacement.training import Trainee
from replacement.training.coder import Coder
from tests.test_replacement_training import D_MODEL, ToyMLPs, toy_config, toy_trainee, trained

DEAD = torch.tensor([0, 3, 4, 31, 50])


def with_dead_features(**changes: object) -> tuple[Coder, Tensor, Tensor]:
    """A dictionary in float64 with a few dead features, its inputs, and what it may have missed."""
    trainee, batch = toy_trainee(start="random", **changes)
    coder, generator = next(iter(trainee)).double(), torch.Generator().manual_seed(1)
    x = trainee.read(coder, batch).double()
    with torch.no_grad():
        for name, p in coder.named_parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if name.endswith("threshold"):
                p.copy_(0.2 + torch.rand(p.shape, generator=generator, dtype=p.dtype))
    coder.since_fired[DEAD] = 1e6
    sizes = torch.linspace(0.1, 2, len(x), dtype=torch.float64)[:, None, None]
    return coder, x, sizes * torch.randn(len(x), 1, D_MODEL, generator=generator, dtype=torch.float64)


def assert_same(coder: Coder, x: Tensor, error: Tensor, expected: Tensor) -> None:
    """The remedy's loss is the expected one, with the same gradients and no others."""
    loss = coder.dead_loss(x, error, torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, expected)
    parameters = dict(coder.named_parameters())
    options = {"allow_unused": True, "materialize_grads": True}
    sides = (torch.autograd.grad(each, list(parameters.values()), **options) for each in (loss, expected))
    for name, ours, theirs in zip(parameters, *sides, strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda words, name=name: f"{name}: {words}")


def test_ghost_gradients_are_those_of_the_published_loss() -> None:
    """Jermyn & Templeton 2024: `exp(pre)` of the dead features writes, is scaled to half of each token's error, and the
    squared distance from the error is scaled to the reconstruction loss; both scales are constants to the gradient.
    """
    coder, x, error = with_dead_features(dead="ghost")
    ghost = (x @ coder.W_enc[DEAD].T + coder.b_enc[DEAD]).exp() @ coder.W_dec[DEAD, 0]
    half = (0.5 * error[:, 0].norm(dim=1) / ghost.norm(dim=1)).detach()
    missed = (error[:, 0] - half[:, None] * ghost).square().mean()
    assert_same(coder, x, error, missed * (error.square().mean() / missed).detach())


@pytest.mark.parametrize("sparsity", ["jumprelu", "batchtopk", "relu"])
def test_the_pre_activation_loss_is_what_dead_features_lack_to_fire(sparsity: str) -> None:
    """Anthropic, January 2025: the mean of `relu(threshold - pre) |d|`, the threshold a constant. So is |d| here: a
    feature would else write less instead of firing more.
    """
    coder, x, error = with_dead_features(dead="preactivation", sparsity=sparsity)
    norms = coder.W_dec[DEAD].flatten(1).norm(dim=1)
    levels = torch.zeros(len(DEAD), dtype=torch.float64)
    if sparsity == "jumprelu":
        levels = coder.sparsity.threshold[DEAD].detach()
    elif sparsity == "batchtopk":
        coder.sparsity.threshold.fill_(0.7)
        levels = 0.7 / norms.detach()
    lacking = (levels - x @ coder.W_enc[DEAD].T - coder.b_enc[DEAD]).relu()
    assert 0 < (lacking > 0).double().mean() < 1
    assert_same(coder, x, error, (lacking * norms.detach()).mean())


def first_step(source: ToyMLPs, remedy: str, weight: float) -> tuple[float, Trainee]:
    """The loss of the first step, and what it makes of the dictionaries; what does not fire in it counts as dead."""
    seen: list[float] = []
    settings = {"start": "random", "n_features": 96, "dead": remedy, "dead_weight": weight, "dead_after": 1}
    listeners = [lambda record: seen.append(record.loss)]
    trainee = trained(source, toy_config(**settings), stop_after=1, listeners=listeners)
    return seen[0], trainee


@pytest.mark.parametrize("remedy", ["auxk", "ghost", "preactivation"])
def test_the_remedy_is_part_of_the_loss_by_its_weight(remedy: str) -> None:
    """The loss rises in proportion to `dead_weight`, and it is the remedy that moves dead features."""
    source = ToyMLPs()
    (plain, still), (some, moved), (more, _) = (first_step(source, remedy, weight) for weight in (0.0, 0.25, 1.0))
    assert some > plain and more - plain == pytest.approx(4 * (some - plain), rel=1e-4)
    for before, after in zip(still, moved, strict=True):
        dead = before.is_dead()
        assert dead.any() and torch.equal(dead, after.is_dead())
        assert (before.W_enc[dead] != after.W_enc[dead]).any()


def test_dead_features_start_again_when_it_is_time() -> None:
    """After as many tokens as make a feature dead, and not while the learning rate falls; the living are left alone."""
    settings = {"start": "random", "n_features": 160, "k": 2, "dead_after": 4 * 64 - 1}
    remedies = {"none": {"dead": "none"}, "resample": {"dead": "resample"}}
    remedies["falling"] = {"dead": "resample", "decay_fraction": 1.0}
    source, ends, dead = ToyMLPs(), {}, {name: list[float]() for name in remedies}
    for name, changes in remedies.items():
        listeners = [lambda record, of=dead[name]: of.append(record.dead)]
        ends[name] = trained(source, toy_config(**settings, **changes), stop_after=4, listeners=listeners)
    assert dead["none"][:3] == dead["resample"][:3] == [0.0] * 3
    assert dead["none"][3] == dead["falling"][3] > 0 == dead["resample"][3]
    for old, new in zip(ends["none"], ends["resample"], strict=True):
        fresh = old.is_dead()
        for before, after in ((old.W_enc, new.W_enc), (old.W_dec, new.W_dec)):
            assert torch.equal(before[~fresh], after[~fresh])
            assert (before[fresh] != after[fresh]).flatten(1).any(1).all()
