"""Laws of the remedies for dead features: the published formulas, their weight in a run, when features start again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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


@pytest.mark.parametrize("remedy", ["auxk", "ghost", "preactivation"])
def test_remedies_move_dead_features_only(remedy: str) -> None:
    """What is added for dead features leaves the living alone."""
    trainee, batch = toy_trainee(dead=remedy)
    coder = next(iter(trainee))
    coder.since_fired[:10] = 1e6
    x = trainee.read(coder, batch)
    error = torch.randn(len(x), 1, D_MODEL, generator=torch.Generator().manual_seed(1))
    coder.dead_loss(x, error, torch.Generator().manual_seed(0)).backward()
    grads = [p.grad for p in (coder.W_enc, coder.W_dec) if p.grad is not None]
    for grad in grads:
        moved = grad.flatten(1).abs().sum(1) > 0
        assert moved[:10].any() and not moved[10:].any()


@pytest.mark.parametrize("sparsity", ["relu", "gated", "jumprelu"])
def test_auxk_under_a_penalty_is_of_each_features_own_tokens(sparsity: str) -> None:
    """`max(pre - least, 0)`, densely, has the same loss and gradients: of features below 0 everywhere, too."""
    trainee, batch = toy_trainee(sparsity=sparsity)
    coder = next(iter(trainee))
    dead = torch.arange(20) * 2
    coder.since_fired[dead] = 1e6
    with torch.no_grad():
        coder.b_enc[dead[:15]] -= 20.0
        coder.b_enc[dead[15:]] += 1.0
    x = trainee.read(coder, batch)
    error = torch.randn(len(x), 1, D_MODEL, generator=torch.Generator().manual_seed(1))
    fast = coder.dead_loss(x, error, torch.Generator().manual_seed(0))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:512]
    pre = x[rows] @ coder.W_enc[dead].T + coder.b_enc[dead]
    count = max(1, round(len(rows) * coder.sparsity.k / len(coder.W_dec)))
    least = pre.detach().sort(dim=0, descending=True).values[count].clamp_max(0)
    cut = F.relu(pre - least)
    assert (pre[:, :15] < 0).all() and (cut[:, :15] > 0).sum(0).eq(count).all() and (least[15:] == 0).any()
    slow = (error[rows, 0] - cut @ coder.W_dec[dead, 0]).pow(2).mean()
    torch.testing.assert_close(fast, slow)
    parameters = [coder.W_enc, coder.b_enc, coder.W_dec]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert a[dead].reshape(20, -1).any(1).all()


def test_preactivation_never_makes_a_dead_feature_write_less() -> None:
    """That would lower its loss where the feature is below 0, and raise the level that batchtopk wants of it."""
    trainee, batch = toy_trainee(dead="preactivation")
    coder = next(iter(trainee))
    coder.since_fired[:10] = 1e6
    x = trainee.read(coder, batch)
    coder.dead_loss(x, torch.zeros(len(x), 1, D_MODEL), torch.Generator().manual_seed(0)).backward()
    assert coder.W_dec.grad is None and coder.b_enc.grad[:10].lt(0).all()


@pytest.mark.parametrize("n_dead", [3, 20])
def test_auxk_over_the_strongest_is_auxk_over_all(n_dead: int) -> None:
    """The same loss and gradients as with every dead feature's pre-activation at every token."""
    trainee, batch = toy_trainee(dead_k=5)
    coder = next(iter(trainee))
    dead = torch.arange(n_dead) * 2
    coder.since_fired[dead] = 1e6
    x = trainee.read(coder, batch)
    error = torch.randn(len(x), 1, D_MODEL, generator=torch.Generator().manual_seed(1))
    fast = coder.dead_loss(x, error, torch.Generator().manual_seed(0))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    pre = F.relu(x[rows] @ coder.W_enc[dead].T + coder.b_enc[dead])
    cut = pre * (pre >= pre.topk(min(5, n_dead), dim=1).values[:, -1:])
    slow = (error[rows, 0] - cut @ coder.W_dec[dead, 0]).pow(2).mean()
    torch.testing.assert_close(fast, slow)
    parameters = [coder.W_enc, coder.b_enc, coder.W_dec]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b)


def test_resampled_features_start_at_tokens_that_are_badly_rebuilt() -> None:
    """All error lies at one token: dead features take its direction, and their optimiser state is zero."""
    trainee, batch = toy_trainee(dead="resample")
    coder = next(iter(trainee))
    optimizer = torch.optim.Adam(coder.parameters())
    trainee(batch, generator=torch.Generator(), memory=0.0).reconstruction.backward()
    optimizer.step()
    before = coder.W_dec.detach().clone()
    coder.since_fired[:10] = 1e6
    x = trainee.read(coder, batch)
    error = torch.zeros(len(x), 1, D_MODEL)
    error[5] = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
    assert coder.resample(x, error, optimizer=optimizer, generator=torch.Generator().manual_seed(0)) == 10
    torch.testing.assert_close(coder.W_dec[:10, 0].detach(), F.normalize(error[5], dim=1).expand(10, -1))
    assert torch.equal(coder.W_dec[10:], before[10:])
    assert not optimizer.state[coder.W_enc]["exp_avg"][:10].any() and optimizer.state[coder.W_enc]["exp_avg"][10:].any()


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


def test_the_share_of_dead_features_is_of_all_features() -> None:
    """However many each dictionary has."""
    trainee, _ = toy_trainee(n_features=(48, 16))
    next(iter(trainee)).since_fired.fill_(1e6)
    assert trainee.dead().item() == 0.75
