"""How well dictionaries rebuild activations, and how often their features fire.

Every figure is a sum over a stream, kept in float64, so the size of the evaluation set is not bound by memory. Knows
dictionaries only by their contract, and nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.dictionary import Dictionary
from replacement.errors import InputError

DENSE = 0.1
"""A feature that fires at more than this share of the tokens is dense."""
CONSTANT = 1e-12
"""Activations with at most this share of `sum |y|^2` as variance do not vary: float32 rounds to 6e-8 of a value (4e-15
when squared), and a sum of rounded numbers to somewhat more."""
BINS_PER_DECADE = 4
DECADES = 7


class ErrorFigures(NamedTuple):
    """What is missed of one activation vector, over an evaluation set."""

    fvu: float  #: `sum |y - y'|^2 / sum |y - mean y|^2`, the mean over the whole set; NaN where y does not vary
    nmse: float  #: `sum |y - y'|^2 / sum |y|^2`
    cosine: float  #: mean over tokens of `y . y' / (|y| |y'|)`, 0 where one of them is 0
    tokens: int  #: size of the set


class FiringFigures(NamedTuple):
    """How often the features of one dictionary fire."""

    n_features: int
    l0: float  #: features that are not zero at a token, on average
    dead: float  #: share of features that fire at no token of the set
    dense: float  #: share of features that fire at more than 10 % of the tokens
    tokens: int  #: size of the set


class DensityHistogram(NamedTuple):
    """How many features fire how often: features by the logarithm of their firing rate."""

    edges: tuple[float, ...]  #: log10 of the rate, ascending; bin i reaches from edge i up to edge i + 1
    counts: tuple[int, ...]  #: features of each bin, one less than edges; the last bin holds rate 1
    dead: int  #: features that never fire, which have no logarithm


class LayerFigures(NamedTuple):
    """Reconstruction by one layer's dictionary over an evaluation set."""

    layer: int
    n_features: int
    fvu: float  #: `sum |y - y'|^2 / sum |y - mean y|^2`, the mean over the whole set
    l0: float  #: features that are not zero at a token, on average
    dead: float  #: share of features that fire at no token of the set
    tokens: int  #: size of the set
    dense: float  #: share of features that fire at more than 10 % of the tokens
    nmse: float  #: `sum |y - y'|^2 / sum |y|^2`
    cosine: float  #: mean cosine of y and y'


class ErrorMeter:
    """Streams FVU, NMSE and cosine of an approximation, in float64.

    The variance of all batches is that of each about its own mean, and of the means (Chan et al. 1979): no large
    numbers are subtracted. Where it is within rounding of the activations (`CONSTANT`), the FVU is NaN.
    """

    def __init__(self) -> None:
        self._error = self._square = self._cosine = self._variance = 0.0
        self._mean: Tensor | float = 0.0
        self._tokens = 0

    @torch.no_grad()
    def update(self, y: Float[Tensor, "tokens width"], approximation: Float[Tensor, "tokens width"]) -> None:
        """Take in one batch: the activations and what stands for them."""
        if not len(y):
            return
        wide, ours = y.double(), approximation.double()
        self._error += (wide - ours).square().sum().item()
        self._square += wide.square().sum().item()
        self._cosine += F.cosine_similarity(wide, ours, eps=1e-30).sum().item()
        mean, before = wide.mean(0), self._tokens
        self._tokens += len(y)
        moved, share = mean - self._mean, len(y) / self._tokens
        self._variance += ((wide - mean).square().sum() + before * share * moved.square().sum()).item()
        self._mean = self._mean + share * moved

    def figures(self) -> ErrorFigures:
        """Figures over everything taken in so far; raises `InputError` when that is nothing."""
        if not self._tokens:
            raise InputError("ErrorMeter.figures(): got no tokens, needs at least one batch; call update first")
        return ErrorFigures(
            fvu=self._error / self._variance if self._variance > CONSTANT * self._square else float("nan"),
            nmse=self._error / self._square if self._square > 0 else float("nan"),
            cosine=self._cosine / self._tokens,
            tokens=self._tokens,
        )


class FiringMeter:
    """Streams how often each feature of a dictionary fires."""

    def __init__(self, n_features: int) -> None:
        self.fired = torch.zeros(n_features, dtype=torch.long)  #: tokens at which each feature fired
        self.tokens = 0

    @torch.no_grad()
    def update(self, activations: Float[Tensor, "tokens n_features"]) -> None:
        """Take in the activations of one batch."""
        self.fired += (activations != 0).sum(0).cpu()
        self.tokens += len(activations)

    def densities(self) -> Float[Tensor, " n_features"]:
        """Share of the tokens at which each feature fires, float64; raises `InputError` where there were none."""
        if not self.tokens:
            raise InputError("FiringMeter: got no tokens, needs at least one batch; call update first")
        return self.fired.double() / self.tokens

    def figures(self) -> FiringFigures:
        """Figures over everything taken in so far; raises `InputError` when that is nothing."""
        densities = self.densities()
        return FiringFigures(
            n_features=len(self.fired),
            l0=densities.sum().item(),
            dead=(self.fired == 0).double().mean().item(),
            dense=(densities > DENSE).double().mean().item(),
            tokens=self.tokens,
        )

    def histogram(self) -> DensityHistogram:
        """Features by log10 of their firing rate, four bins a decade from 1e-7 to 1."""
        densities = self.densities()
        alive = densities[densities > 0].log10()
        index = ((alive + DECADES) * BINS_PER_DECADE).floor().long().clamp(0, DECADES * BINS_PER_DECADE - 1)
        edges = tuple(i / BINS_PER_DECADE - DECADES for i in range(DECADES * BINS_PER_DECADE + 1))
        counts: Int[Tensor, " bins"] = torch.bincount(index, minlength=len(edges) - 1)
        return DensityHistogram(edges, tuple(counts.tolist()), int((densities == 0).sum()))


class ReconstructionMeter:
    """Streams all figures of one dictionary at its own layer."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.firing, self.error = FiringMeter(dictionary.n_features), ErrorMeter()

    @torch.no_grad()
    def update(self, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> None:
        """Take in one batch: the dictionary's input and what it should write at its own layer."""
        activations = self.dictionary.encode(x)
        approximation = (
            self.dictionary.decode(activations, self.dictionary.layer) + self.dictionary.b_dec + self.dictionary.skip(x)
        )
        self.firing.update(activations)
        self.error.update(y, approximation)

    def figures(self) -> LayerFigures:
        """Figures over everything taken in so far; raises `InputError` when that is nothing."""
        if not self.firing.tokens:
            raise InputError(
                "ReconstructionMeter.figures(): got no tokens, needs at least one batch; call update first"
            )
        return layer_figures(self.dictionary.layer, self.firing, self.error)


def layer_figures(layer: int, firing: FiringMeter, error: ErrorMeter) -> LayerFigures:
    """The figures of one layer's meters."""
    fires, missed = firing.figures(), error.figures()
    return LayerFigures(
        layer=layer,
        n_features=fires.n_features,
        fvu=missed.fvu,
        l0=fires.l0,
        dead=fires.dead,
        tokens=missed.tokens,
        dense=fires.dense,
        nmse=missed.nmse,
        cosine=missed.cosine,
    )


def evaluate_reconstruction(
    dictionaries: Iterable[Dictionary], batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]
) -> list[LayerFigures]:
    """FVU, L0, dead and dense fractions, NMSE and cosine of each dictionary at its own layer, over the same tokens.

    `FVU = sum |y - y'|^2 / sum |y - mean y|^2`; `L0 = E #(a != 0)`; dead: no fire in the whole set.

    dictionaries: any number, each writing its own layer. batches: pairs of MLP inputs and MLP outputs, `[layers,
    tokens, width]` or a list with one tensor a layer, indexed by layer. Raises `InputError` for an empty stream.
    """
    meters = [ReconstructionMeter(dictionary) for dictionary in dictionaries]
    for inputs, outputs in batches:
        for meter in meters:
            meter.update(inputs[meter.dictionary.layer], outputs[meter.dictionary.layer])
    return [meter.figures() for meter in meters]
