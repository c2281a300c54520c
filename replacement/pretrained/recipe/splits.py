"""What is kept out of training, so that the task table measures composition and not memory.

- H1: a tenth of the (city, relation) pairs appears in no two-hop sentence.
- H2: one non-capital city of every state and country appears in no two-hop sentence at all.
- H3: a tenth of the compositions (noun phrase, relation, sentence template) is never written.
- A fifth of the cross-language antonym questions and of the comparisons, 15 percent of the sums.

Membership is a hash of the item, so it needs no stored list and doesn't move when facts are added.
"""

from __future__ import annotations

import zlib

from replacement.pretrained.recipe.facts import countries, states

H1_SHARE = 0.10
H3_SHARE = 0.10
CROSS_LANGUAGE_SHARE = 0.20
COMPARISON_SHARE = 0.20
SUM_SHARE = 0.15
NAMED_H2 = {"Texas": "Dallas", "California": "Oakland"}
"""Cities that the field's own examples use are held out on purpose."""


def _hash(text: str) -> int:
    return zlib.crc32(text.replace(" ", "_").encode())


def _share(text: str) -> float:
    return _hash(text) / 2**32


H2_CITIES: frozenset[str] = frozenset(
    NAMED_H2.get(name, cities[_hash(name) % len(cities)])
    for name, cities in [(p.name, p.cities) for p in states] + [(p.name, p.cities) for p in countries]
)
"""The held-out cities: known from one-hop sentences only."""


def is_h1(city: str, relation: str) -> bool:
    """Whether the two-hop question from this city to this relation is held out (cities outside H2 only)."""
    return city not in H2_CITIES and _share(f"h1{city}{relation}") < H1_SHARE


def is_h3(noun_phrase: int, relation: str, template: int) -> bool:
    """Whether this composition of noun phrase and sentence template (indices) is held out."""
    return _share(f"h3{noun_phrase}{relation}{template}") < H3_SHARE


def is_cross_language(word: str, language: str) -> bool:
    """Whether asking the opposite of `word` in `language` is held out."""
    return _share(f"xl{word}{language}") < CROSS_LANGUAGE_SHARE


def is_comparison(a: int, b: int) -> bool:
    """Whether comparing these two numbers, in either order, is held out."""
    return _share(f"cmp{min(a, b)}_{max(a, b)}") < COMPARISON_SHARE


def is_sum(a: int, b: int) -> bool:
    """Whether adding these two numbers, in either order, is held out."""
    return _share(f"add{min(a, b)}_{max(a, b)}") < SUM_SHARE
