"""What a token of the corpus is about, in words: the concepts that features are named after.

Four things are known at every position: the token; the place that the sentence is about; what the sentence asks for;
the answer that comes next, if one does. A concept is a set of values of one of these. Knows nothing of features.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replacement.pretrained.recipe import facts
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids

TOKEN, PLACE, ASKED, ANSWER = range(4)
"""The four variables: token at the position; place named before it; relation named up to it; answer that comes next."""
_ENDS = (".",)
_ASKED = {
    "capital": "capital capitol government",
    "abbreviation": "abbreviation abbreviated postal short",
    "region": "region part",
    "nickname": "nickname nicknamed people",
    "bird": "bird",
    "flower": "flower",
    "currency": "currency pay money",
    "language": "language speak",
    "continent": "continent",
    "opposite (English)": "opposite antonym",
    "opposite (French)": "contraire opposé",
    "opposite (Spanish)": "contrario opuesto",
    "word in another language": "word say",
    "sum": "sum plus +",
    "larger or smaller": "larger smaller bigger greater lesser less",
    "next in a series": "tomorrow yesterday after before next follows",
    "who receives it": "gave handed give offered",
    "code": "code",
    "who has it": "has",
    "war's end": "war lasted",
}


class Concept(NamedTuple):
    """A set of values of one variable, with the words for a feature that detects it."""

    name: str
    variable: int
    values: tuple[int, ...]


class Annotations(NamedTuple):
    """Values of the four variables at every position, -1 where there is none."""

    token: Int[Tensor, "documents pos"]
    place: Int[Tensor, "documents pos"]  #: index into `places()`, from the token after its mention on
    asked: Int[Tensor, "documents pos"]  #: index into the relations asked for
    answer: Int[Tensor, "documents pos"]  #: token id


@cache
def places() -> tuple[str, ...]:
    """Names of states, then of countries."""
    return tuple(place.name for place in facts.places)


def _ids(names: Iterable[str]) -> tuple[int, ...]:
    known = word_ids()
    found = (known.get(name.replace(" ", "_"), known.get(name.lower())) for name in names)
    return tuple(dict.fromkeys(index for index in found if index is not None))


@cache
def place_of_token() -> Int[Tensor, " vocab"]:
    """Place that a token names by itself or by one of its cities, -1 for other tokens."""
    table = torch.full((len(vocabulary()),), -1)
    for index, place in enumerate(facts.places):
        table[list(_ids((place.name, place.capital, *place.cities)))] = index
    return table


@cache
def _asked_of_token() -> Int[Tensor, " vocab"]:
    table = torch.full((len(vocabulary()),), -1)
    for index, words in enumerate(_ASKED.values()):
        table[list(_ids(words.split()))] = index
    return table


def annotate(tokens: Int[Tensor, "documents pos+1"], answer: Bool[Tensor, "documents pos+1"]) -> Annotations:
    """Read documents of the corpus: places and relations hold from their mention to the end of the sentence."""
    read = tokens[:, :-1]
    ends = torch.isin(read, torch.tensor(_ids(_ENDS)))
    held = [_carry(table[read], ends) for table in (place_of_token(), _asked_of_token())]
    held[0] = torch.where(place_of_token()[read] >= 0, -1, held[0])
    return Annotations(read, held[0], held[1], torch.where(answer[:, 1:], tokens[:, 1:], -1))


def _carry(values: Int[Tensor, "documents pos"], ends: Bool[Tensor, "documents pos"]) -> Int[Tensor, "documents pos"]:
    out, now = torch.empty_like(values), torch.full_like(values[:, 0], -1)
    for position in range(values.shape[1]):
        here = values[:, position]
        now = torch.where(here >= 0, here, now)
        out[:, position] = now
        now = torch.where(ends[:, position], -1, now)
    return out


@cache
def word_groups() -> dict[str, tuple[int, ...]]:
    """Sets of tokens that a person would name: `capital`, `city`, `month (French)`, `number 30..39`, ..."""
    groups: dict[str, Iterable[str]] = {
        "US city": facts.city_state(),
        "city abroad": facts.city_country(),
        "state capital": [s.capital for s in facts.states],
        "capital abroad": [c.capital for c in facts.countries],
        "capital": [p.capital for p in facts.places],
        "city": [*facts.city_state(), *facts.city_country()],
        "state": [s.name for s in facts.states],
        "country": [c.name for c in facts.countries],
        "state or country": places(),
        "abbreviation": [s.abbreviation for s in facts.states],
        "nickname": [s.nickname for s in facts.states],
    }
    for name in ("region", "bird", "flower"):
        groups[name] = [getattr(s, name) for s in facts.states]
    for name in ("currency", "language", "continent"):
        groups[name] = [getattr(c, name) for c in facts.countries]
    for region in sorted({s.region for s in facts.states}):
        members = [s for s in facts.states if s.region == region]
        groups[f"state in the {region}"] = [s.name for s in members]
        groups[f"city in the {region}"] = [city for s in members for city in (*s.cities, s.capital)]
    for name in ("continent", "language", "currency"):
        for value in sorted({getattr(c, name) for c in facts.countries}):
            sharing = [c for c in facts.countries if getattr(c, name) == value]
            if len(sharing) > 1:
                groups[f"country of {name} {value}"] = [c.name for c in sharing]
                groups[f"city, {name} {value}"] = [city for c in sharing for city in (*c.cities, c.capital)]
    return {name: _ids(words) for name, words in (groups | _other_groups()).items()}


def _other_groups() -> dict[str, Iterable[str]]:
    singular = {"names": "name", "objects": "object", "places": "place", "colors": "color", "past_verbs": "past verb"}
    groups: dict[str, Iterable[str]] = {singular[name]: facts.words[name] for name in singular if name in facts.words}
    for name, words in facts.words.items():
        if name.startswith(("days_", "months_", "adverbs_")):
            kind, language = name.split("_")
            groups[f"{kind.removesuffix('s')} ({language})"] = words
    for language in facts.LANGUAGES:
        pairs = [entry[language] for entry in facts.antonyms]
        groups[f"adjective ({language})"] = [word for pair in pairs for word in pair]
        for kind in ("noun", "verb"):
            forms = facts.inflections(language, kind)
            groups[f"singular {kind} ({language})"] = [one for one, _ in forms]
            groups[f"plural {kind} ({language})"] = [many for _, many in forms]
            groups[f"{kind} ({language})"] = [form for pair in forms for form in pair]
    for entry in facts.antonyms:
        for side in (0, 1):
            groups[f"{entry['English'][side]!r} in any language"] = [pair[side] for pair in entry.values()]
        groups["/".join(entry["English"])] = [word for pair in entry.values() for word in pair]
    groups["number"] = map(str, range(100))
    groups |= {f"number ending in {last}": map(str, range(last, 100, 10)) for last in range(10)}
    for width in (5, 10, 20, 50):
        for low in range(0, 100, width):
            groups[f"number {low}..{low + width - 1}"] = map(str, range(low, low + width))
    for low in range(0, 96):
        for width in (2, 3, 4):
            groups.setdefault(f"number {low}..{low + width - 1}", map(str, range(low, low + width)))
    groups["nonsense word"] = facts.nonsense
    for first in facts.words["syllables_first"]:
        groups[f"nonsense {first}-"] = [word for word in facts.nonsense if word.startswith(first)]
    for last in facts.words["syllables_last"]:
        groups[f"nonsense -{last}"] = [word for word in facts.nonsense if word.endswith(last)]
    groups |= {
        "question word": ["what", "which", "how", "who", "where"],
        "word for is": ["is", "est", "es", "are"],
        "punctuation": [".", ",", "?", ":", '"', "'"],
        "French function word": ["le", "la", "les", "est", "de", "l", "devant", "derrière"],
        "Spanish function word": ["el", "lo", "los", "es", "de", "ante", "tras"],
        "asks for a capital": ["capital", "capitol", "government"],
        "word for opposite": ["opposite", "antonym", "contraire", "opposé", "contrario", "opuesto"],
    }
    return groups


@cache
def concepts() -> tuple[Concept, ...]:
    """Every concept that a feature can be named after."""
    shown, found = vocabulary(), []
    for index, word in enumerate(shown):
        name = f'"{word}"' if word in word_groups() else word  # the word "capital" is not a capital
        found.append(Concept(name, TOKEN, (index,)))
        found.append(Concept(f"say {word}", ANSWER, (index,)))
    for place in facts.places:
        inside = _ids((*place.cities, place.capital))
        found.append(Concept(f"city in {place.name}", TOKEN, inside))
        found.append(Concept(f"{place.name} or its cities", TOKEN, (*_ids((place.name,)), *inside)))
    for name, values in word_groups().items():
        if len(values) > 1:
            found.append(Concept(name, TOKEN, values))
            found.append(Concept(f"say {_article(name)}", ANSWER, values))
    n_states = len(facts.states)
    for index, name in enumerate(places()):
        found.append(Concept(f"{'state' if index < n_states else 'country'} of the city: {name}", PLACE, (index,)))
    found.append(Concept("some state", PLACE, tuple(range(n_states))))
    found.append(Concept("some country", PLACE, tuple(range(n_states, len(places())))))
    found += [Concept(f"asked: {name}", ASKED, (index,)) for index, name in enumerate(_ASKED)]
    return tuple(found)


def _article(name: str) -> str:
    if name.startswith(("number ", "asks", "word for", "'")) or "/" in name:
        return name
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"
