"""Dictionaries beside their baselines on one sample: what each rebuilds, and what few of its columns know.

Reads the sample's first half to fit, its second to measure. Knows baselines and probes by their functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.dictionary import Dictionary, DictionarySet
from replacement.evaluation.baselines import principal_components, random_dictionary, strongest_neurons
from replacement.evaluation.probing import accuracy, balanced_examples, fit_difference_in_means, fit_probe
from replacement.evaluation.reconstruction import ErrorMeter
from replacement.evaluation.sample import Halves, Sample
from replacement.evaluation.splicing import encode, reconstruct, written_hooks
from replacement.neurons import Neurons
from replacement.sites import hook_name
from replacement.substitution import read_hooks
from replacement.transcoder import Transcoder

MOST_RANDOM = 8192
"""A random dictionary is fitted with at most that many features: its decoder is one dense solve."""
LEAST_EXAMPLES = 20
"""Tasks with fewer examples of a class, in either half of the sample, are left out."""
MOST_EXAMPLES = 1000
MOST_TOKENS = 8192
"""Of each half of a sample, that many tokens are used for reconstruction."""
_ROWS = 1024
Encoder = Callable[[Sample], Float[Tensor, "tokens columns"]]


class BaselineFigures(NamedTuple):
    """FVU of a dictionary and of what needs none, at one dictionary's own layer, on the same tokens."""

    layer: int
    site: str  #: hook that is approximated
    l0: int  #: components, random features and neurons active at a token: the dictionary's L0, rounded
    dictionary: float  #: of all dictionaries that write there together
    components: float  #: best affine map of rank l0 (PCA where a site is read and written)
    random: float  #: random encoder with the best decoder, same width and L0
    neurons: float | None  #: the l0 neurons that write most; None where an MLP is not what is replaced


class ProbeFigures(NamedTuple):
    """What columns of one representation say of one property; chance is 1/2."""

    task: str
    layer: int
    representation: str  #: "features", "random", "neurons", "components", "raw", "difference in means"
    k: int | None  #: columns that the probe reads; None for all
    accuracy: float
    f1: float
    examples: int  #: that it was measured on, half of them positive


@torch.no_grad()
def compare_reconstruction(
    dictionaries: DictionarySet, halves: Halves, neurons: Mapping[int, Dictionary] | None = None
) -> list[BaselineFigures]:
    """FVU of each dictionary's own site beside that of components, a random dictionary and neurons at the same L0.

    Fitted on the first half's first 8,192 tokens, measured on the second's. What several dictionaries write together (a
    cross-layer transcoder) has more features behind it than the baselines, which get the reading layer's L0.

    neurons: the model's neurons by layer, where dictionaries stand for its MLPs.
    """
    fit, test = (part.part(slice(MOST_TOKENS)) for part in halves)
    ours, found = _fvu_of_all(dictionaries, test), []
    for layer, one in sorted(dictionaries.by_layer.items()):
        site = hook_name(one.write_layers[0], one.write)
        x, y, unseen = _inputs(one, fit), fit.values[site], _inputs(one, test)
        l0 = _l0(one, x)
        linear, random = principal_components(x, y.to(x), l0), _random(one, fit, site, l0)
        strongest = None
        if neurons is not None and (mlp := _neurons(neurons, one)) is not None:
            strongest = mlp.decode(strongest_neurons(mlp, unseen, l0), layer) + mlp.b_dec
        found.append(
            BaselineFigures(
                layer,
                site,
                l0,
                ours[site],
                _fvu(test.values[site], linear.approximate(unseen)),
                _fvu(test.values[site], *(random(part) for part in unseen.split(_ROWS))),
                None if strongest is None else _fvu(test.values[site], strongest),
            )
        )
    return found


@torch.no_grad()
def compare_probes(
    dictionaries: DictionarySet,
    halves: Halves,
    neurons: Mapping[int, Dictionary] | None = None,
    *,
    ks: tuple[int, ...] = (1, 5),
    seed: int = 0,
) -> list[ProbeFigures]:
    """Sparse probes on features, beside the same on baselines and two probes on all raw activations that are read.

    Each task's examples are drawn balanced, from one half to fit and from the other to measure. Tasks with too few
    examples are left out. ks: columns of the sparse probes.
    """
    found = []
    for layer, one in sorted(dictionaries.by_layer.items()):
        encoders = _encoders(one, halves.fit, neurons)
        for task in halves.fit.labels:
            drawn = [balanced_examples(part.labels[task], limit=MOST_EXAMPLES, seed=seed) for part in halves]
            if min(len(rows) for rows, _ in drawn) < 2 * LEAST_EXAMPLES:
                continue
            parts = [part.part(rows) for part, (rows, _) in zip(halves, drawn, strict=True)]
            labels = [which for _, which in drawn]
            for name, k, encoder in _probed(encoders, ks):
                fit, test = (encoder(part).cpu() for part in parts)
                means = name == "difference in means"
                probe = fit_difference_in_means(fit, labels[0]) if means else fit_probe(fit, labels[0], k=k)
                score = accuracy(probe, test, labels[1])
                found.append(ProbeFigures(task, layer, name, k, score.accuracy, score.f1, score.examples))
    return found


def _probed(encoders: Mapping[str, Encoder], ks: tuple[int, ...]) -> Iterator[tuple[str, int | None, Encoder]]:
    for name, encoder in encoders.items():
        if name == "raw":
            yield name, None, encoder
            yield "difference in means", None, encoder
        else:
            yield from ((name, k, encoder) for k in ks)


def _encoders(one: Dictionary, fit: Sample, neurons: Mapping[int, Dictionary] | None) -> dict[str, Encoder]:
    """Each representation of what a dictionary reads, as a function of a sample."""
    fit = fit.part(slice(MOST_TOKENS))
    x = _inputs(one, fit)
    random, components = _random(one, fit, None, _l0(one, x)), principal_components(x, x, x.shape[1])
    found: dict[str, Encoder] = {
        "features": lambda part: one.encode(_inputs(one, part)),
        "random": lambda part: random.encode(_inputs(one, part)),
        "components": lambda part: components.encode(_inputs(one, part)),
        "raw": lambda part: _inputs(one, part),
    }
    if neurons is not None and (mlp := _neurons(neurons, one)) is not None:
        found["neurons"] = lambda part: mlp.encode(_inputs(one, part))
    return found


def _random(one: Dictionary, fit: Sample, site: str | None, l0: int) -> Transcoder:
    x = _inputs(one, fit)
    y = x if site is None else fit.values[site].to(x)
    return random_dictionary(
        x, y, n_features=min(one.n_features, MOST_RANDOM), k=l0, layer=one.layer, read=one.read, write=one.write
    )


def _inputs(one: Dictionary, part: Sample) -> Float[Tensor, "tokens d_in"]:
    return torch.cat([part.values[name] for name in read_hooks(one)], -1).to(one.b_dec.device, one.b_dec.dtype)


def _neurons(neurons: Mapping[int, Dictionary], one: Dictionary) -> Neurons | None:
    """The neurons of the MLP that a dictionary stands for, if it does."""
    own = neurons.get(one.layer)
    fits = isinstance(own, Neurons) and (own.read, own.write) == (one.read, one.write)
    return own if fits and isinstance(own, Neurons) and not isinstance(one, Neurons) else None


def _l0(one: Dictionary, x: Float[Tensor, "tokens d_in"]) -> int:
    """Active features a token, rounded, at least 1."""
    active = sum(int((one.encode(part) != 0).sum()) for part in x.split(_ROWS))
    return max(1, round(active / len(x)))


def _fvu_of_all(dictionaries: DictionarySet, test: Sample) -> dict[str, float]:
    """FVU of every written site, by all dictionaries that write there."""
    meters, device = {site: ErrorMeter() for site in written_hooks(dictionaries)}, next(iter(dictionaries)).b_dec.device
    for start in range(0, len(next(iter(test.values.values()))), _ROWS):
        values = {name: value[start : start + _ROWS].to(device) for name, value in test.values.items()}
        encodings = encode(dictionaries, values)
        for site, meter in meters.items():
            meter.update(values[site], reconstruct(dictionaries, site, values, encodings))
    return {site: meter.figures().fvu for site, meter in meters.items()}


def _fvu(y: Float[Tensor, "tokens width"], *parts: Float[Tensor, "some width"]) -> float:
    meter = ErrorMeter()
    meter.update(y, torch.cat([part.cpu() for part in parts]))
    return meter.figures().fvu
