"""How much of a property few features hold: sparse logistic probes, and the simple probes they are measured against.

Gurnee et al. 2023 ("Finding Neurons in a Haystack"), and the sparse probing of SAEBench (Karvonen et al. 2025): the k
columns whose class means differ most, and a logistic regression on them. A column is a feature, a neuron, a principal
component or a coordinate; this file does not know which. Labels are the caller's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

from replacement.errors import InputError


class Probe(NamedTuple):
    """A linear rule on chosen columns: positive where `x[:, columns] @ weight + bias > 0`."""

    columns: Int[Tensor, " k"]
    weight: Float[Tensor, " k"]  #: float64
    bias: float

    def scores(self, x: Float[Tensor, "examples width"]) -> Float[Tensor, " examples"]:
        """The rule's value at each example, float64."""
        return x[:, self.columns].double() @ self.weight + self.bias


class Accuracy(NamedTuple):
    """A rule's answers against labels."""

    accuracy: float  #: share of right answers
    f1: float  #: `2 hits / (2 hits + false alarms + misses)`, 0 without hits
    examples: int


def strongest_columns(
    x: Float[Tensor, "examples width"], labels: Bool[Tensor, " examples"], k: int
) -> Int[Tensor, " k"]:
    """The k columns with the largest `|mean(x | label) - mean(x | no label)|`, largest first (Gurnee et al. 2023)."""
    _require_both(labels)
    difference = (x[labels].double().mean(0) - x[~labels].double().mean(0)).abs()
    return difference.topk(min(k, x.shape[1])).indices


def fit_probe(
    x: Float[Tensor, "examples width"],
    labels: Bool[Tensor, " examples"],
    *,
    k: int | None = None,
    ridge: float = 1e-3,
    balanced: bool = True,
) -> Probe:
    """A logistic regression on the k columns whose class means differ most (None: on all columns).

    Minimises `sum_i c_i log(1 + exp(-s_i (w . z_i + b))) + ridge/2 |w|^2`, `s_i = +-1`, z the columns divided by one
    number, the root of their mean variance, so that a rotation of them changes nothing; in float64 by L-BFGS.

    balanced: weights `c_i` such that both classes weigh 1/2 together; else 1 / examples each.
    Raises `InputError` where a class has no examples.
    """
    _require_both(labels)
    columns = torch.arange(x.shape[1]) if k is None else strongest_columns(x, labels, k)
    z = x[:, columns].double()
    scale = float(z.var(0, correction=0).mean().sqrt()) or 1.0
    signs = torch.where(labels, 1.0, -1.0).double()
    share = labels.double().mean()
    weights = torch.where(labels, 0.5 / share, 0.5 / (1 - share)) if balanced else torch.ones_like(signs)
    found = _minimise((z / scale).numpy(), signs.numpy(), (weights / len(labels)).double().numpy(), ridge)
    return Probe(columns, torch.from_numpy(found[:-1]) / scale, float(found[-1]))


def fit_difference_in_means(x: Float[Tensor, "examples width"], labels: Bool[Tensor, " examples"]) -> Probe:
    """The rule `(mu_1 - mu_0) . (x - (mu_1 + mu_0) / 2) > 0`, mu the class means; no fitting beyond them."""
    _require_both(labels)
    positive, negative = x[labels].double().mean(0), x[~labels].double().mean(0)
    direction = positive - negative
    return Probe(torch.arange(x.shape[1]), direction, float(-direction @ (positive + negative) / 2))


def accuracy(probe: Probe, x: Float[Tensor, "examples width"], labels: Bool[Tensor, " examples"]) -> Accuracy:
    """How often the rule is right, and its F1 for the positive class."""
    said = probe.scores(x) > 0
    hits, wrong = int((said & labels).sum()), int((said != labels).sum())
    return Accuracy(1 - wrong / len(labels), 2 * hits / (2 * hits + wrong) if hits else 0.0, len(labels))


def balanced_examples(
    labels: Int[Tensor, " tokens"], *, limit: int, seed: int
) -> tuple[Int[Tensor, " chosen"], Bool[Tensor, " chosen"]]:
    """As many positive as negative examples, drawn at random: their indices, and which of them are positive.

    labels: 1 positive, 0 negative, -1 of neither. limit: most of each class. Chance is 1/2 on what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(labels == value).flatten() for value in (1, 0)]
    count = min(limit, *(len(one) for one in classes))
    drawn = [one[torch.randperm(len(one), generator=generator)[:count]] for one in classes]
    return torch.cat(drawn), torch.arange(2 * count) < count


def _require_both(labels: Bool[Tensor, " examples"]) -> None:
    positives = int(labels.sum())
    if not 0 < positives < len(labels):
        raise InputError(f"probe: got {positives} positive of {len(labels)} examples, needs some of both classes")


def _minimise(z: np.ndarray, signs: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """Weights and bias of the regression; the bias has no penalty."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (z @ w[:-1] + w[-1])
        slopes = -weights * signs * np.exp(-np.logaddexp(0, margins))
        value = float(weights @ np.logaddexp(0, -margins) + ridge / 2 * w[:-1] @ w[:-1])
        return value, np.append(z.T @ slopes + ridge * w[:-1], slopes.sum())

    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-8}
    return minimize(loss, np.zeros(z.shape[1] + 1), jac=True, method="L-BFGS-B", options=options).x
