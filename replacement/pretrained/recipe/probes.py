"""Properties of atlas's tokens that probes are asked for: what a token is, and what its sentence is about.

Labels come from the facts and from what stands before the token, so every document of the corpus has them. Knows
nothing of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from replacement.pretrained.recipe import facts
from replacement.pretrained.recipe.concepts import annotate, place_of_token, places, word_groups
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids

Labelling = Callable[[Int[Tensor, "documents pos"]], Int[Tensor, "documents pos"]]
N_STATES = 4
"""States with a task of their own: those with the most cities."""


def probe_tasks() -> dict[str, Labelling]:
    """Task -> labels of every token: 1 where it holds, 0 where not, -1 where the question does not arise.

    Of the token itself: is it a city, an American city among cities, a state against a country, a city of a region or
    of one of the four largest states among American cities, an even number, a number below 50. Of the sentence: whether
    it is about an American place, once a place was named.
    """
    groups = word_groups()
    cities, numbers = groups["city"], {int(vocabulary()[i]): i for i in groups["number"]}
    tasks = {
        "is a city": _of_token(cities),
        "city in a US state": _of_token(groups["US city"], among=cities),
        "state, not country": _of_token(groups["state"], among=groups["state or country"]),
        "even number": _of_token([i for n, i in numbers.items() if n % 2 == 0], among=numbers.values()),
        "number below 50": _of_token([i for n, i in numbers.items() if n < 50], among=numbers.values()),
        "sentence about a US place": _about_a_state,
    }
    for region in sorted({one.region for one in facts.states}):
        tasks[f"city in the {region}"] = _of_token(groups[f"city in the {region}"], among=groups["US city"])
    for state in sorted(facts.states, key=lambda one: -len(one.cities))[:N_STATES]:
        inside = [i for i in groups["US city"] if place_of_token()[i] == places().index(state.name)]
        tasks[f"city in {state.name}"] = _of_token(inside, among=groups["US city"])
    return tasks


def _of_token(positive: Iterable[int], *, among: Iterable[int] | None = None) -> Labelling:
    table = torch.full((len(vocabulary()),), -1 if among is not None else 0)
    if among is not None:
        table[list(among)] = 0
    table[list(positive)] = 1
    table[[word_ids()[word] for word in ("<pad>", "<bos>", "<unk>")]] = -1
    return lambda tokens: table[tokens]


def _about_a_state(tokens: Int[Tensor, "documents pos"]) -> Int[Tensor, "documents pos"]:
    padded = torch.cat([tokens, tokens[:, :1]], 1)  # `annotate` reads documents with one token more
    place = annotate(padded, torch.zeros_like(padded, dtype=torch.bool)).place
    return torch.where(place < 0, -1, (place < len(facts.states)).long())
