"""The facts behind the embedded model: states, countries, antonyms, word lists, read from the tables in this folder.

Knows what is true of the small world (Dallas is in Texas), and nothing of sentences, tokens or held-out splits.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import NamedTuple

LANGUAGES = ("English", "French", "Spanish")


class State(NamedTuple):
    """One US state and its attributes; `cities` leaves out the capital."""

    name: str
    abbreviation: str
    region: str
    capital: str
    nickname: str
    bird: str
    flower: str
    cities: tuple[str, ...]


class Country(NamedTuple):
    """One country and its attributes; `cities` leaves out the capital."""

    name: str
    capital: str
    currency: str
    language: str
    continent: str
    cities: tuple[str, ...]


def rows(table: str) -> list[dict[str, str]]:
    """Rows of one of the tables of this folder (`states`, `words`, ...), keyed by the header line."""
    text = resources.files(__package__).joinpath(f"{table}.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def _split(row: dict[str, str]) -> dict[str, object]:
    return {**row, "cities": tuple(row["cities"].split(", "))}


states: tuple[State, ...] = tuple(State(**_split(row)) for row in rows("states"))  # type: ignore[arg-type]
countries: tuple[Country, ...] = tuple(Country(**_split(row)) for row in rows("countries"))  # type: ignore[arg-type]
places: tuple[State | Country, ...] = (*states, *countries)
relations: dict[str, tuple[str, ...]] = {"state": State._fields[1:-1], "country": Country._fields[1:-1]}
"""Attributes that sentences speak of, by kind of place: names of fields of `State` and `Country`."""


@cache
def city_state() -> dict[str, str]:
    """State of every US city, capitals included."""
    return {city: state.name for state in states for city in (*state.cities, state.capital)}


@cache
def city_country() -> dict[str, str]:
    """Country of every city outside the US, capitals included."""
    return {city: country.name for country in countries for city in (*country.cities, country.capital)}


@cache
def attributes(kind: str) -> dict[str, dict[str, str]]:
    """Attributes of every place of one kind (`state`, `country`): `attributes("state")["Texas"]["capital"]`."""
    places = states if kind == "state" else countries
    return {place.name: {name: getattr(place, name) for name in relations[kind]} for place in places}


def _antonyms() -> tuple[dict[str, tuple[str, str]], ...]:
    text = resources.files(__package__).joinpath("antonyms.tsv").read_text(encoding="utf-8")
    pairs = []
    for line in text.splitlines()[1:]:
        words = line.split("\t")
        pairs.append({language: (words[2 * i], words[2 * i + 1]) for i, language in enumerate(LANGUAGES)})
    return tuple(pairs)


antonyms: tuple[dict[str, tuple[str, str]], ...] = _antonyms()
"""One entry per meaning: language -> (word, opposite); the same index means the same in every language."""

words: dict[str, tuple[str, ...]] = {row["list"]: tuple(row["words"].split()) for row in rows("words")}
"""Word lists: `names`, `objects`, `places`, `colors`, `past_verbs`, `days_English`, ..."""

nonsense: tuple[str, ...] = tuple(a + b for a in words["syllables_first"] for b in words["syllables_last"])
"""Invented words for induction: they mean nothing, so that they can only be copied."""


def inflections(language: str, kind: str) -> tuple[tuple[str, str], ...]:
    """(singular, plural) forms of the nouns or verbs of one language; `kind` is `noun` or `verb`."""
    table = rows("agreement")
    return tuple((r["singular"], r["plural"]) for r in table if r["language"] == language and r["kind"] == kind)
