"""Laws of probes: the regression is at its optimum, the rules are what they are defined as, planted properties are
found."""

from __future__ import annotations

import pytest
import torch

from replacement.errors import InputError
from replacement.evaluation.probing import (
    accuracy,
    balanced_examples,
    fit_difference_in_means,
    fit_probe,
    strongest_columns,
)


def data(examples: int = 200, width: int = 6, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that overlap, of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(examples, generator=generator) < 0.3
    x = torch.randn(examples, width, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0, 1.0])[:width]
    x[:, 1] += 6 * labels
    x[:, 3] -= labels.float()
    return x, labels


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("k", [None, 2])
def test_the_regression_minimises_its_loss(balanced: bool, k: int | None) -> None:
    """Its value is that of a slow and simple minimiser of the formula in the docstring."""
    x, labels = data()
    probe = fit_probe(x, labels, k=k, ridge=0.01, balanced=balanced)
    z = x[:, probe.columns].double()
    scale = z.var(0, correction=0).mean().sqrt()
    z = z / scale
    signs = torch.where(labels, 1.0, -1.0).double()
    c = torch.full_like(signs, 1 / len(labels))
    if balanced:
        c = torch.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())

    def loss(w: torch.Tensor) -> torch.Tensor:
        margins = signs * (z @ w[:-1] + w[-1])
        return (c * torch.nn.functional.softplus(-margins)).sum() + 0.005 * w[:-1].square().sum()

    w = torch.zeros(z.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([w], lr=2.0)
    for _ in range(6000):
        optimiser.zero_grad()
        loss(w).backward()
        optimiser.step()
    found = torch.cat([probe.weight * scale, torch.tensor([probe.bias])])
    assert loss(found).item() == pytest.approx(loss(w).item(), abs=1e-9)


def test_a_rotation_of_all_columns_changes_no_score() -> None:
    x, labels = data()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q
    here, there = fit_probe(x, labels).scores(x), fit_probe(x.double() @ turn, labels).scores(x.double() @ turn)
    assert torch.allclose(here, there, atol=1e-4)


def test_columns_are_ranked_by_the_difference_of_class_means() -> None:
    x, labels = data()
    difference = (x[labels].double().mean(0) - x[~labels].double().mean(0)).abs()
    assert strongest_columns(x, labels, 3).tolist() == difference.argsort(descending=True)[:3].tolist()
    assert len(strongest_columns(x, labels, 99)) == 6


def test_difference_in_means_decides_by_the_nearer_mean_along_their_line() -> None:
    x, labels = data(seed=1)
    probe, ones, zeros = fit_difference_in_means(x, labels), x[labels].double().mean(0), x[~labels].double().mean(0)
    nearer = (x.double() - ones).norm(dim=1) < (x.double() - zeros).norm(dim=1)
    assert torch.equal(probe.scores(x) > 0, nearer)


def test_accuracy_and_f1_equal_their_definitions() -> None:
    x, labels = data(seed=2)
    probe = fit_probe(x, labels, k=1)
    said, found = probe.scores(x) > 0, accuracy(probe, x, labels)
    precision, recall = (labels[said].double().mean().item(), said[labels].double().mean().item())
    assert found.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert found.accuracy == pytest.approx((said == labels).double().mean().item())


def test_a_planted_feature_is_all_that_a_sparse_probe_needs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(400, generator=generator) < 0.5
    features = (torch.rand(400, 50, generator=generator) < 0.1).float()
    features[:, 17] = labels.float() * 2
    probe = fit_probe(features, labels, k=1)
    assert probe.columns.tolist() == [17] and accuracy(probe, features, labels).accuracy == 1


def test_examples_are_balanced_and_the_same_for_a_seed() -> None:
    labels = torch.tensor([1, 0, 0, -1, 1, 0, 1, -1, 0, 0])
    rows, positive = balanced_examples(labels, limit=100, seed=3)
    assert labels[rows].tolist() == positive.long().tolist() and positive.sum() == 3 and len(rows) == 6
    assert len(set(rows.tolist())) == 6
    assert torch.equal(rows, balanced_examples(labels, limit=100, seed=3)[0])
    assert len(balanced_examples(labels, limit=2, seed=3)[0]) == 4


def test_one_class_alone_is_refused() -> None:
    x, labels = data()
    with pytest.raises(InputError, match="got 0 positive of 200 examples"):
        fit_probe(x, torch.zeros_like(labels))
