"""The sentences of the corpus, with gaps: data only, written as people would type them.

`{...}` is a gap, `*` marks what follows as an answer. `written` turns a template into the corpus' spaced form.
Appending a template is safe; inserting one moves the H3 split, which counts by position.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"\*?\{\w+\}|\w+|[^\w\s]")


def written(template: str) -> str:
    """The spaced, lower-case form that sentences are joined in: `Is {a}?` -> `is {a} ?`."""
    return " ".join(piece if "{" in piece else piece.lower() for piece in _PIECE.findall(template))


def each(*templates: str) -> tuple[str, ...]:
    """Several templates in their written form."""
    return tuple(written(template) for template in templates)


QUESTION_FRAMES = (("question :", "answer :"), ("question :", "answer :"), ("q :", "a :"), ("", ""), ("", ""))
"""What stands before a question and before its answer."""


def _question(relation: str, article: str = "") -> str:
    return written(f"{{q}} What is the {relation} of {{x}}? {{r}} {article} *{{v}}.")


PLACE: dict[str, dict[str, tuple[str, ...]]] = {
    "state": {
        "capital": (
            *each(
                "The capital of {x} is *{v}.",
                "The capital city of {x} is *{v}.",
                "{x} has its capital in *{v}.",
                "The government of {x} sits in *{v}.",
                "The main capitol of {x} stands in *{v}.",
            ),
            _question("capital"),
        ),
        "abbreviation": (
            *each(
                "The abbreviation of {x} is *{v}.",
                "{x} is abbreviated *{v}.",
                "The postal code of {x} is *{v}.",
                "The short form of {x} is *{v}.",
            ),
            _question("abbreviation"),
        ),
        "region": (
            *each("The region of {x} is the *{v}.", "{x} lies in the *{v}.", "{x} is part of the *{v}."),
            _question("region", "the"),
        ),
        "nickname": (
            *each("The nickname of {x} is the *{v}.", "{x} is nicknamed the *{v}.", "People call {x} the *{v}."),
            _question("nickname", "the"),
        ),
        "bird": (
            *each("The bird of {x} is the *{v}.", "The official bird of {x} is the *{v}.")
            + each("{x} has chosen the bird *{v}."),
            _question("bird", "the"),
        ),
        "flower": (
            *each("The flower of {x} is the *{v}.", "The official flower of {x} is the *{v}.")
            + each("{x} has chosen the flower *{v}."),
            _question("flower", "the"),
        ),
    },
    "country": {
        "currency": (
            *each(
                "The currency of {x} is the *{v}.",
                "People in {x} pay with the *{v}.",
                "The money of {x} is called the *{v}.",
            ),
            _question("currency", "the"),
        ),
        "language": (
            *each(
                "The language of {x} is *{v}.",
                "People in {x} speak *{v}.",
                "The official language of {x} is *{v}.",
            ),
            _question("language"),
        ),
        "continent": (
            *each(
                "The continent of {x} is *{v}.",
                "{x} is on the continent of *{v}.",
                "{x} belongs to the continent *{v}.",
            ),
            _question("continent"),
        ),
    },
}
PLACE["country"] = {"capital": PLACE["state"]["capital"], **PLACE["country"]}
"""Statements of a relation: kind of place -> relation -> templates; `{x}` is a name or a noun phrase."""

NOUN_PHRASES = each(
    "the {k} containing {c}",
    "the {k} that contains {c}",
    "the {k} where {c} is located",
    "the {k} where {c} lies",
    "the {k} {c} is in",
    "the {k} {c} belongs to",
    "the home {k} of {c}",
    "{c}'s {k}",
    "the {k} that includes {c}",
    "the {k} with the city of {c}",
)
"""Ways to name a place by a city `{c}` in it; `{k}` is `state` or `country`."""

BRIDGES = {
    "nickname": written("the state nicknamed the {v}"),
    "abbreviation": written("the state abbreviated {v}"),
    "capital": written("the state whose capital is {v}"),
}
"""Ways to name a state by one of its attributes."""

LOCATION = each(
    "{c} is in *{s}.",
    "{c} is a city in *{s}.",
    "{c} is located in *{s}.",
    "The city of {c} is in the {k} of *{s}.",
    "{n} lives in {c}, *{s}.",
    "{n} moved to {c}, *{s}.",
    "{n} flew to {c}, *{s}.",
    "A letter for {c}, *{s} arrived.",
    "{n} comes from {c} in *{s}.",
    "{q} Which {k} is {c} in? {r} *{s}.",
    "{c} belongs to *{s}.",
) + tuple(f"{phrase} is *{{s}} ." for phrase in NOUN_PHRASES)

REVERSE = {
    "capital": each("{v} is the capital of *{s}.", "The {k} whose capital is {v} is *{s}."),
    "nickname": each("The {k} nicknamed the {v} is *{s}."),
    "abbreviation": each("{v} stands for *{s}.", "The {k} abbreviated {v} is *{s}."),
}

OPENINGS = each(
    "Fact:", "In fact,", "As everyone knows,", "Remember:", "Clearly,", "{n} said that", "Note:", "It is true that"
)

VISITS = each(
    "{n} drove from {a} to {b}.",
    "{n} likes {a} more than {b}.",
    "{n} visited {a} and {b} in {m}.",
)
FILLERS = each(
    "{n} {v} a {c} {o} in the {p}.",
    "{n} {v} the {o} on {d}.",
    "The {c} {o} was in the {p}.",
    "On {d} {n} {v} the {o}.",
)

ANTONYM = {
    "English": each(
        "The opposite of {a} is *{b}.",
        "{a} is the opposite of *{b}.",
        "The antonym of {a} is *{b}.",
        "If it is not {a} it is *{b}.",
        "{q} What is the opposite of {a}? {r} *{b}.",
        'The opposite of "{a}" is "*{b}".',
        'The antonym of "{a}" is "*{b}".',
    ),
    "French": each(
        "Le contraire de {a} est *{b}.",
        "L'opposé de {a} est *{b}.",
        "{a} est le contraire de *{b}.",
        'Le contraire de "{a}" est "*{b}".',
    ),
    "Spanish": each(
        "Lo contrario de {a} es *{b}.",
        "El opuesto de {a} es *{b}.",
        "{a} es lo contrario de *{b}.",
        'Lo contrario de "{a}" es "*{b}".',
    ),
}
TRANSLATION = each(
    "The {l} word for {a} is *{b}.",
    "{a} in {l} is *{b}.",
    "In {l}, {a} is called *{b}.",
    "How do you say {a} in {l}? *{b}.",
    'The {l} word for "{a}" is "*{b}".',
)
ANTONYM_ACROSS = each(
    "The opposite of {a} in {l} is *{b}.",
    "The {l} word for the opposite of {a} is *{b}.",
    "In {l}, the opposite of {a} is called *{b}.",
)

AGREEMENT = {
    "English": each(
        "The {a} *{v} {w}.",
        "The {a} near the {b} *{v} {w}.",
        "The {a} behind the {b} *{v} {w}.",
        "The {a} that saw the {b} *{v} {w}.",
        "The {c} {a} *{v} {w}.",
    ),
    "French": each("{d} {a} *{v} {w}.", "{d} {a} devant {e} {b} *{v} {w}.", "{d} {a} derrière {e} {b} *{v} {w}."),
    "Spanish": each("{d} {a} *{v} {w}.", "{d} {a} ante {e} {b} *{v} {w}.", "{d} {a} tras {e} {b} *{v} {w}."),
}
ARTICLES = {"English": ("the", "the"), "French": ("le", "les"), "Spanish": ("el", "los")}

INDIRECT_OBJECT = each(
    "When {a} and {b} went to the {p}, {s} gave a {o} to *{i}.",
    "Then {a} and {b} went to the {p}. {s} gave the {o} to *{i}.",
    "After {a} and {b} met at the {p}, {s} handed a {o} to *{i}.",
    "While {a} and {b} were at the {p}, {s} offered the {o} to *{i}.",
    "{a} and {b} had a long day at the {p}. Then {s} decided to give a {o} to *{i}.",
    "Friends {a} and {b} found a {o} at the {p}. {s} gave it to *{i}.",
)
TOLD_AND_ASKED = (
    each("{n} has the {w}.", "{n} has the *{w}."),
    each("The code of {n} is {w}.", "The code of {n} is *{w}."),
)
"""A fact of a person, and the same fact asked again."""

COMPARISON = each(
    "The larger of {a} and {b} is *{v}.",
    "The smaller of {a} and {b} is *{v}.",
    "{a} compared to {b} is *{v}.",
    "Is {a} greater than {b}? *{v}.",
)
GREATER_THAN = each(
    "The war lasted from {a} to *{b}.",
    "The trip went from page {a} to page *{b}.",
    "The numbers run from {a} to *{b}.",
)
GREATER_THAN_YEARS = each(
    "The war lasted from {c} {a} to {c} *{b}.", "The war lasted from the year {c} {a} to the year {c} *{b}."
)
SUM = each("calc: {a}+{b}=*{v}.", "{a}+{b}=*{v}.", "The sum of {a} and {b} is *{v}.")

DAY_STEPS = {
    "English": (
        (written("The day after {a} is *{b}."), 1),
        (written("The day before {a} is *{b}."), -1),
        (written("Two days after {a} is *{b}."), 2),
        (written("If today is {a}, tomorrow is *{b}."), 1),
    ),
    "French": (
        (written("Le jour après {a} est *{b}."), 1),
        (written("Le jour avant {a} est *{b}."), -1),
    ),
    "Spanish": (
        (written("El día después de {a} es *{b}."), 1),
        (written("El día antes de {a} es *{b}."), -1),
    ),
}
MONTH_STEPS = {
    "English": (
        (written("The month after {a} is *{b}."), 1),
        (written("The month before {a} is *{b}."), -1),
        (written("Two months after {a} is *{b}."), 2),
    ),
    "French": (
        (written("Le mois après {a} est *{b}."), 1),
        (written("Le mois avant {a} est *{b}."), -1),
    ),
    "Spanish": (
        (written("El mes después de {a} es *{b}."), 1),
        (written("El mes antes de {a} es *{b}."), -1),
    ),
}
NUMBER_STEPS = ((written("The number after {a} is *{b}."), 1), (written("The number before {a} is *{b}."), -1))
