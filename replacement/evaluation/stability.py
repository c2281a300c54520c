"""How much two dictionaries have in common: matched cosines of their decoder rows.

Cosines are taken in float64. The greedy figure is the mean max cosine similarity of Sharkey et al. 2022; the one-to-one
figure follows Paulo and Belrose 2025 ("Sparse autoencoders trained on the same data learn different features"), whose
threshold is 0.7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.evaluation.splicing import written_hooks
from replacement.substitution import read_hooks

SHARED = 0.7
"""Matched features with at least this cosine count as the same."""
_ROWS = 1024


class StabilityFigures(NamedTuple):
    """Features of one dictionary against another's."""

    greedy: float  #: mean over rows of a of the largest cosine with any row of b
    matched: float  #: mean cosine of pairs under the best one-to-one matching (Hungarian algorithm)
    shared: float  #: share of those pairs with a cosine of at least 0.7
    features: tuple[int, int]  #: rows compared: of a, of b; rows of length 0 are left out


def write_directions(dictionary: Dictionary) -> Float[Tensor, "n_features width"]:
    """What each feature writes, at all its layers side by side."""
    features = torch.arange(dictionary.n_features, device=dictionary.b_dec.device)
    return torch.cat([dictionary.write_rows(features, layer).detach() for layer in dictionary.write_layers], -1)


def shared_layers(a: DictionarySet, b: DictionarySet) -> tuple[int, ...]:
    """Layers under which both sets file a dictionary, to be compared.

    Raises `InputError` where there are none, or where two of one layer read or write different hooks: what features
    write at different places cannot be the same.
    """
    layers = tuple(sorted(a.by_layer.keys() & b.by_layer.keys()))
    if not layers:
        raise InputError(f"stability of {a.name} against {b.name}: they share no layer; needs dictionaries of the same")
    for layer in layers:
        ours, theirs = (_places(one.by_layer[layer]) for one in (a, b))
        if ours != theirs:
            raise InputError(
                f"stability of {a.name} against {b.name}: layer {layer} {ours} in one and {theirs} in the other; needs "
                "a set of the same sites, trained with another seed"
            )
    return layers


def _places(dictionary: Dictionary) -> str:
    reads, writes = (", ".join(hooks) for hooks in (read_hooks(dictionary), written_hooks([dictionary])))
    return f"reads {reads} and writes {writes}"


def stability(
    a: Float[Tensor, "n_a width"],
    b: Float[Tensor, "n_b width"],
    *,
    alive_a: Int[Tensor, " n"] | None = None,
    alive_b: Int[Tensor, " m"] | None = None,
) -> StabilityFigures:
    """Matched cosines of decoder rows: `mean_i max_j cos(a_i, b_j)`, and `max over matchings of mean cos(a_i, b_m(i))`.

    a, b: decoder rows, one feature each. alive_a, alive_b: rows to compare (None: all); dead features keep the
    directions they started with and would pass for instability.
    Raises `InputError` for rows of different width, or no rows.
    """
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"stability: rows of width {a.shape[1]} and {b.shape[1]}; needs dictionaries of the same sites"
        )
    left, right = (_unit(rows if alive is None else rows[alive]) for rows, alive in ((a, alive_a), (b, alive_b)))
    if not len(left) or not len(right):
        raise InputError(
            f"stability: got {len(left)} and {len(right)} features that write anything, needs some of each"
        )
    cosines = torch.cat([part @ right.T for part in left.split(_ROWS)])
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    pairs = cosines[torch.from_numpy(rows), torch.from_numpy(columns)]
    return StabilityFigures(
        greedy=cosines.amax(1).mean().item(),
        matched=pairs.mean().item(),
        shared=(pairs >= SHARED).double().mean().item(),
        features=(len(left), len(right)),
    )


def _unit(rows: Float[Tensor, "n width"]) -> Float[Tensor, "kept width"]:
    wide = rows.cpu().double()
    return F.normalize(wide[wide.norm(dim=1) > 0], dim=1)
