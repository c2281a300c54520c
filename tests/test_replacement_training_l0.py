"""Penalties come to the wanted L0, also where a weight alone does not bring them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from replacement.training import Trainee, plans, train
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
    """Features that fire at a token of a batch that training has not seen, in every finished dictionary."""
    batch = source.batch(10_000)
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


def test_where_nothing_fires_biases_rise() -> None:
    """There is no density to count; a dictionary that fell silent comes back nevertheless."""
    trainee, source = start(config(sparsity="relu"))
    for coder in trainee:
        coder.b_enc.data.sub_(100.0)
    before = [coder.b_enc.clone() for coder in trainee]
    trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=1.0)
    trainee.nudge()
    assert all((coder.b_enc > b).all() for coder, b in zip(trainee, before, strict=True))
