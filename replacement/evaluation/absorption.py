"""First-letter feature absorption: a letter's feature stays silent where a narrower feature has taken its place.

Chanin et al. 2024 ("A is for Absorption"), in the projection form of SAEBench (Karvonen et al. 2025): the share of what
a token writes along the letter's direction that features other than the letter's own supply. Knows activations and
decoder rows; nothing of models or of how tokens were run.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.errors import InputError
from replacement.evaluation.probing import accuracy, fit_probe

F1_JUMP = 0.03  #: another feature belongs to the letter where it raises the sparse probe's F1 by more
MOST_MAIN = 10  #: most features that a letter is split into
MOST_ABSORBING = 3  #: most features that take its place at a token
ABSORBING_COSINE = 0.1  #: least cosine of their decoder rows with the letter's direction
FULL_COSINE = 0.025  #: the same for full absorption by one feature
FULL_SHARE = 0.4  #: least share of the token's projection that this one supplies
LEAST_F1 = 0.6  #: letters whose probe on raw activations is worse are left out: the model does not hold them
LEAST_TOKENS = 10  #: letters with fewer tokens, for testing, are left out
TEST_SHARE = 0.3


class LetterFigures(NamedTuple):
    """Absorption of one letter."""

    letter: str
    probe_f1: float  #: of the logistic probe on raw activations, on tokens it was not fitted to
    main: tuple[int, ...]  #: the letter's own features
    tokens: int  #: test tokens with that letter that the raw probe gets right
    fraction: float  #: mean absorption fraction over them
    full: float  #: share of them that one other feature absorbs fully


class AbsorptionFigures(NamedTuple):
    """Absorption over all letters that the activations hold."""

    fraction: float  #: mean over letters; NaN where there are none
    full: float  #: mean over letters
    letters: tuple[LetterFigures, ...]
    left_out: tuple[str, ...]  #: letters with too few tokens, or that a probe on raw activations does not find


def first_letters(words: Sequence[str]) -> Int[Tensor, " words"]:
    """Number of each word's first letter, a 0 to z 25; -1 for what is not written in those letters alone."""
    plain = [word.strip().lower() for word in words]
    letters = set(string.ascii_lowercase)
    return torch.tensor([ord(word[0]) - ord("a") if word and set(word) <= letters else -1 for word in plain])


def first_letter_absorption(
    activations: Float[Tensor, "tokens n_features"],
    written: Float[Tensor, "tokens width"],
    decoder: Float[Tensor, "n_features width"],
    letters: Int[Tensor, " tokens"],
    *,
    seed: int = 0,
) -> AbsorptionFigures:
    """The mean absorption fraction, and the share of tokens that are absorbed fully.

    p is the unit direction of a logistic probe for the letter on raw activations y, `c_i = a_i d_i . p` what feature i
    supplies along it. The letter's main features M are those that are most larger with the letter than without, as long
    as each raises the F1 of a probe on them by more than 0.03. At a test token that starts with the letter, which the
    raw probe gets right:

    - fraction: with A the at most 3 other features with `c_i > 0` and `cos(d_i, p) >= 0.1` that supply most, it is
      `sum_A c / (sum_A c + max(sum_M c, 0))` where `sum_M c < y . p`, else 0: the main features supply it all;
    - full: no main feature is active, and one other feature with `cos(d_i, p) >= 0.025` has `c_i >= 0.4 y . p`.

    activations, written: of one dictionary at each token of the vocabulary. letters: as from `first_letters`.
    Raises `InputError` where no token has a letter.
    """
    kept = torch.nonzero(letters >= 0).flatten()
    if not len(kept):
        raise InputError("first_letter_absorption: no token is a word of the letters a to z; pass another model")
    order = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    test, train = order.split([round(TEST_SHARE * len(order)), len(order) - round(TEST_SHARE * len(order))])
    found, left_out = [], []
    for number, letter in enumerate(string.ascii_lowercase):
        is_letter = letters == number
        if is_letter[test].sum() < LEAST_TOKENS:
            left_out.append(letter)
            continue
        probe = fit_probe(written[train], is_letter[train])
        f1 = accuracy(probe, written[test], is_letter[test]).f1
        if f1 < LEAST_F1:
            left_out.append(letter)
            continue
        main = _main_features(activations[train], is_letter[train])
        right = test[(probe.scores(written[test]) > 0) & is_letter[test]]
        direction = F.normalize(probe.weight, dim=0)
        fraction, full = absorbed(activations[right], written[right], decoder, direction, main)
        means = (fraction.mean().item(), full.double().mean().item())
        found.append(LetterFigures(letter, f1, tuple(main.tolist()), len(right), *means))
    return AbsorptionFigures(
        _mean([one.fraction for one in found]), _mean([one.full for one in found]), tuple(found), tuple(left_out)
    )


def absorbed(
    activations: Float[Tensor, "tokens n_features"],
    written: Float[Tensor, "tokens width"],
    decoder: Float[Tensor, "n_features width"],
    direction: Float[Tensor, " width"],
    main: Int[Tensor, " main"],
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Absorption fraction of each token, and whether it is absorbed fully, as `first_letter_absorption` defines them.

    direction: the letter's, of length 1. main: the letter's own features.
    """
    rows = decoder.double()
    along, cosine = rows @ direction, F.normalize(rows, dim=1) @ direction
    supplied = activations.double() * along
    others = torch.ones(len(along), dtype=torch.bool)
    others[main] = False
    projection = written.double() @ direction
    own = supplied[:, main].sum(1)
    candidates = torch.where(others & (cosine >= ABSORBING_COSINE), supplied, 0.0).clamp_min(0)
    taken = candidates.topk(min(MOST_ABSORBING, len(along)), dim=1).values.sum(1)
    fraction = torch.where((own < projection) & (taken > 0), taken / (taken + own.clamp_min(0)), 0.0)
    strongest = torch.where(others & (cosine >= FULL_COSINE), supplied, 0.0).amax(1)
    silent = (activations[:, main] == 0).all(1)
    return fraction, silent & (projection > 0) & (strongest >= FULL_SHARE * projection)


def _main_features(activations: Float[Tensor, "tokens n_features"], is_letter: Bool[Tensor, " tokens"]) -> Tensor:
    """The letter's own features: columns are added while each raises the sparse probe's F1 by more than 0.03.

    Only features that are larger with the letter than without can be its own; there is at least one.
    """
    larger = activations[is_letter].double().mean(0) - activations[~is_letter].double().mean(0)
    columns = larger.topk(min(MOST_MAIN, max(1, int((larger > 0).sum())))).indices
    best = 0.0
    for count in range(1, len(columns) + 1):
        part = activations[:, columns[:count]]
        f1 = accuracy(fit_probe(part, is_letter), part, is_letter).f1
        if count > 1 and f1 - best <= F1_JUMP:
            return columns[: count - 1]
        best = f1
    return columns


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
