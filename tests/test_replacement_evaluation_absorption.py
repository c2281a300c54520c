"""Laws of first-letter absorption: what is planted is found, and the figures equal their definitions token by token."""

from __future__ import annotations

import math

import pytest
import torch

from replacement.errors import InputError
from replacement.evaluation.absorption import absorbed, first_letter_absorption, first_letters

WIDTH, EACH = 40, 60


def planted(absorbed_share: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of the letters a and b: each letter has a direction and a feature; some tokens of a have a feature of
    their own instead, which writes a's direction too.
    """
    generator = torch.Generator().manual_seed(0)
    letters = torch.arange(3).repeat_interleave(EACH)
    n_absorbed = round(absorbed_share * EACH)
    decoder = torch.zeros(3 + n_absorbed, WIDTH)
    decoder[:3, :3] = torch.eye(3)
    decoder[3:, 0] = 1.0
    decoder[3:, 5:] = 0.3 * torch.randn(n_absorbed, WIDTH - 5, generator=generator)
    activations = torch.zeros(3 * EACH, 3 + n_absorbed)
    activations[torch.arange(3 * EACH), letters] = 3.0
    stolen = torch.randperm(EACH, generator=generator)[:n_absorbed]
    activations[stolen, 0] = 0
    activations[stolen, 3 + torch.arange(n_absorbed)] = 3.0
    written = activations @ decoder + 0.01 * torch.randn(3 * EACH, WIDTH, generator=generator)
    return activations, written, decoder, letters


def test_without_absorption_there_is_none() -> None:
    found = first_letter_absorption(*planted(0.0))
    assert [one.letter for one in found.letters] == ["a", "b", "c"]
    assert found.fraction == pytest.approx(0, abs=1e-6) and found.full == 0
    assert [one.main for one in found.letters] == [(0,), (1,), (2,)]
    assert len(found.left_out) == 23


def test_planted_absorption_is_measured() -> None:
    """A quarter of the tokens of one letter has its feature absorbed, the others' letters none."""
    found = first_letter_absorption(*planted(0.25))
    a, *others = found.letters
    assert 0.1 < a.full < 0.4 and a.fraction == pytest.approx(a.full, abs=0.02)
    assert a.main[0] == 0 and all(one.full == 0 for one in others)
    assert found.full == pytest.approx(a.full / 3)


def test_only_features_that_a_letter_raises_are_its_own() -> None:
    """Where half of a letter's tokens are absorbed, the absence of other letters' features says more than its own."""
    assert all(number in one.main for number, one in enumerate(first_letter_absorption(*planted(0.5)).letters))


def test_absorption_of_tokens_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.relu(torch.randn(50, 12, generator=generator) - 0.3).double()
    decoder = torch.randn(12, 6, generator=generator).double()
    written = activations @ decoder + torch.randn(50, 6, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(6, generator=generator).double(), dim=0)
    main = torch.tensor([2, 7])
    fraction, full = absorbed(activations, written, decoder, direction, main)
    cosine = [float(row @ direction / row.norm()) for row in decoder]
    for token in range(50):
        supplied = [float(activations[token, i] * (decoder[i] @ direction)) for i in range(12)]
        projection = float(written[token] @ direction)
        own = supplied[2] + supplied[7]
        others = [i for i in range(12) if i not in (2, 7)]
        taken = sum(sorted((supplied[i] for i in others if cosine[i] >= 0.1 and supplied[i] > 0), reverse=True)[:3])
        expected = taken / (taken + max(own, 0)) if own < projection and taken > 0 else 0
        assert fraction[token].item() == pytest.approx(expected)
        silent = not activations[token, main].any()
        strong = any(cosine[i] >= 0.025 and supplied[i] >= 0.4 * projection for i in others)
        assert bool(full[token]) == (silent and strong and projection > 0)
    assert 0 < full.sum() < 50


def test_letters_that_activations_do_not_hold_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, letters = torch.randn(200, 8, generator=generator), torch.arange(200) % 4
    found = first_letter_absorption(torch.relu(noise), noise, torch.eye(8), letters)
    assert not found.letters and math.isnan(found.fraction) and len(found.left_out) == 26


def test_first_letters_of_words() -> None:
    assert first_letters([" Apple", "zoo", "é", "3", "", "it's", "b"]).tolist() == [0, 25, -1, -1, -1, -1, 1]
    with pytest.raises(InputError, match="no token is a word"):
        first_letter_absorption(torch.ones(2, 2), torch.ones(2, 2), torch.eye(2), torch.tensor([-1, -1]))
