"""Sentences about the facts: one method a task, drawn at random or for a given fact.

A sentence is a string of words joined by spaces; a name of several words is joined by underscores (`New_York`), and a
word that a model is to predict starts with `*`. Knows the facts and the splits, and nothing of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any, TypeVar

from replacement.pretrained.recipe import facts, splits
from replacement.pretrained.recipe import templates as forms

T = TypeVar("T")


def atom(name: str) -> str:
    """A name as one word of a sentence: `New York` -> `New_York`."""
    return name.replace(" ", "_")


CITY_PLACE: dict[str, dict[str, str]] = {
    "state": {atom(city): atom(state) for city, state in facts.city_state().items()},
    "country": {atom(city): atom(country) for city, country in facts.city_country().items()},
}
ATTRIBUTES: dict[str, dict[str, dict[str, str]]] = {
    kind: {
        atom(place): {relation: atom(value) for relation, value in table.items()}
        for place, table in facts.attributes(kind).items()
    }
    for kind in ("state", "country")
}
CITIES = {kind: tuple(table) for kind, table in CITY_PLACE.items()}
PLACES = {kind: tuple(table) for kind, table in ATTRIBUTES.items()}
H2 = frozenset(atom(city) for city in splits.H2_CITIES)
ANTONYMS = tuple({lang: (atom(a), atom(b)) for lang, (a, b) in entry.items()} for entry in facts.antonyms)
NOUNS = {language: facts.inflections(language, "noun") for language in facts.LANGUAGES}
VERBS = {language: facts.inflections(language, "verb") for language in facts.LANGUAGES}
COPIED = facts.nonsense * 3 + sum((facts.words[name] for name in ("names", "objects", "colors")), ())
COPIED += CITIES["state"] + CITIES["country"]
WEIGHTED_RELATIONS = {
    "state": ("capital",) * 3 + ("abbreviation", "nickname", "bird") * 2 + ("flower", "region"),
    "country": ("capital", "capital", "currency", "language", "language", "continent"),
}
"""How often a two-hop question asks for each relation."""
LARGEST = 99
"""The largest number; every number from 0 is one word."""
NEAR = (2, 6)
"""Least and greatest difference of numbers that are near each other.

Not 1: where a number and the next are held out, those on either side of the two would push them apart the wrong way.
"""
AS_USUAL: Mapping[str, int] = MappingProxyType({})
"""No task's weight is changed."""


class Sentences:
    """A stream of random sentences; the same `seed` gives the same stream.

    weights: of tasks by name, how often they are drawn, where not as usual; raises `ValueError` on a name that is no
    task's. attributes: what is true of places, as `ATTRIBUTES`.
    """

    def __init__(
        self,
        seed: int,
        *,
        weights: Mapping[str, int] = AS_USUAL,
        attributes: dict[str, dict[str, dict[str, str]]] = ATTRIBUTES,
    ) -> None:
        self.attributes = attributes
        self.generator = random.Random(seed)
        self.uniform = self.generator.random
        self.tasks: dict[str, tuple[Callable[[], str], int]] = {
            "one hop, states": (lambda: self.one_hop("state"), 15),
            "two hops, states": (lambda: self.two_hops("state"), 15),
            "one hop, countries": (lambda: self.one_hop("country"), 8),
            "two hops, countries": (lambda: self.two_hops("country"), 7),
            "antonym": (self.antonym, 7),
            "translation": (self.translation, 4),
            "antonym across languages": (self.antonym_across, 4),
            "agreement": (self.agreement, 6),
            "indirect object": (self.indirect_object, 6),
            "induction": (self.induction, 16),
            "comparison": (self.comparison, 6),
            "comparison of near numbers": (self.comparison_of_near, 0),
            "greater than": (self.greater_than, 4),
            "sum": (self.sum, 9),
            "succession": (self.succession, 5),
            "filler": (self.filler, 4),
        }
        if unknown := weights.keys() - self.tasks.keys():
            raise ValueError(
                f"Sentences(weights={dict(weights)}): no task {sorted(unknown)}; there are {list(self.tasks)}"
            )
        self._choices = [task for task, _ in self.tasks.values()]
        self._bounds = list(accumulate(weights.get(name, usual) for name, (_, usual) in self.tasks.items()))

    def pick(self, items: Sequence[T]) -> T:
        """One item, all equally likely (several times faster than `random.choice`)."""
        return items[int(self.uniform() * len(items))]

    def draw(self) -> str:
        """One sentence of a task drawn by its weight."""
        return self.generator.choices(self._choices, cum_weights=self._bounds)[0]()

    def _name(self) -> str:
        return self.pick(facts.words["names"])

    def _asked(self, template: str, **gaps: Any) -> str:
        if "{q}" in template:
            gaps["q"], gaps["r"] = self.pick(forms.QUESTION_FRAMES)
        return template.format(**gaps)

    def _opening(self) -> str:
        return self.pick(forms.OPENINGS).format(n=self._name()) + " " if self.uniform() < 0.3 else ""

    # --- places

    def one_hop(self, kind: str) -> str:
        """A location, an attribute or an attribute the other way round, perhaps with an opening."""
        if self.uniform() < 0.5:
            return self._opening() + self.location(kind)
        forward = self.uniform() < (0.85 if kind == "state" else 0.9)
        return self._opening() + (self.attribute(kind) if forward else self.reverse(kind))

    def location(self, kind: str, city: str | None = None) -> str:
        """In which state or country (`kind`) a city is."""
        city = city or self.pick(CITIES[kind])
        return self._asked(self.pick(forms.LOCATION), c=city, s=CITY_PLACE[kind][city], k=kind, n=self._name())

    def attribute(self, kind: str, place: str | None = None, relation: str | None = None) -> str:
        """A relation of a named place."""
        place = place or self.pick(PLACES[kind])
        relation = relation or self.pick(tuple(forms.PLACE[kind]))
        template = self.pick(forms.PLACE[kind][relation])
        return self._asked(template, x=place, v=self.attributes[kind][place][relation])

    def reverse(self, kind: str, place: str | None = None, relation: str | None = None) -> str:
        """The place that has an attribute."""
        place = place or self.pick(PLACES[kind])
        relation = relation or (self.pick(tuple(forms.REVERSE)) if kind == "state" else "capital")
        return self.pick(forms.REVERSE[relation]).format(v=self.attributes[kind][place][relation], s=place, k=kind)

    def two_hop_question(self, kind: str, city: str, relation: str, noun_phrase: int, template: int) -> str:
        """A relation of the place that a city is in, in the given composition, held out or not."""
        phrase = forms.NOUN_PHRASES[noun_phrase].format(k=kind, c=city)
        value = self.attributes[kind][CITY_PLACE[kind][city]][relation]
        return self._asked(forms.PLACE[kind][relation][template], x=phrase, v=value)

    def composition(self, kind: str, relation: str, held_out: bool = False) -> tuple[int, int]:
        """A (noun phrase, template) pair from inside or outside the H3 split."""
        while True:
            noun_phrase = int(self.uniform() * len(forms.NOUN_PHRASES))
            template = int(self.uniform() * len(forms.PLACE[kind][relation]))
            if splits.is_h3(noun_phrase, relation, template) == held_out:
                return noun_phrase, template

    def two_hops(self, kind: str) -> str:
        """A two-hop sentence that no split holds out."""
        if kind == "state" and self.uniform() < 0.12:
            return self._bridged()
        while True:
            city, relation = self.pick(CITIES[kind]), self.pick(WEIGHTED_RELATIONS[kind])
            if city not in H2 and not splits.is_h1(city, relation):
                break
        return self._opening() + self.two_hop_question(kind, city, relation, *self.composition(kind, relation))

    def _bridged(self) -> str:
        while True:
            state = self.pick(PLACES["state"])
            source, relation = self.pick(tuple(forms.BRIDGES)), self.pick(WEIGHTED_RELATIONS["state"])
            if source != relation:
                break
        table = self.attributes["state"][state]
        phrase = forms.BRIDGES[source].format(v=table[source])
        return self._asked(self.pick(forms.PLACE["state"][relation]), x=phrase, v=table[relation])

    # --- fillers, in which nothing can be known beforehand

    def visit(self) -> str:
        """A sentence that mentions two cities to no purpose."""
        cities = CITIES["state"] + CITIES["country"]
        template, month = self.pick(forms.VISITS), self.pick(facts.words["months_English"])
        return template.format(n=self._name(), a=self.pick(cities), b=self.pick(cities), m=month)

    def filler(self) -> str:
        """A sentence about people and things."""
        if self.uniform() < 0.4:
            return self.visit()
        lists = {"o": "objects", "v": "past_verbs", "c": "colors", "p": "places", "d": "days_English"}
        gaps = {gap: self.pick(facts.words[name]) for gap, name in lists.items()}
        return self.pick(forms.FILLERS).format(n=self._name(), **gaps)

    # --- words

    def antonym(self, language: str | None = None, entry: dict[str, tuple[str, str]] | None = None) -> str:
        """An opposite within one language."""
        language = language or self.pick(("English", "English", "French", "Spanish"))
        a, b = (entry or self.pick(ANTONYMS))[language]
        if self.uniform() < 0.5:
            a, b = b, a
        return self._asked(self.pick(forms.ANTONYM[language]), a=a, b=b)

    def translation(self) -> str:
        """A word in another language."""
        entry, side = self.pick(ANTONYMS), int(self.uniform() * 2)
        source, target = self.generator.sample(facts.LANGUAGES, 2)
        return self.pick(forms.TRANSLATION).format(l=target, a=entry[source][side], b=entry[target][side])

    def antonym_across(self, held_out: bool = False) -> str:
        """The opposite of a word in another language, from inside or outside the split."""
        while True:
            entry, side = self.pick(ANTONYMS), int(self.uniform() * 2)
            source, target = self.generator.sample(facts.LANGUAGES, 2)
            a, b = entry[source][side], entry[target][1 - side]
            if splits.is_cross_language(a, target) == held_out:
                return self.pick(forms.ANTONYM_ACROSS).format(a=a, b=b, l=target)

    def agreement(self, language: str | None = None) -> str:
        """A verb that agrees with its subject, perhaps across another noun."""
        language = language or self.pick(("English", "English", "French", "Spanish"))
        subject, other = int(self.uniform() * 2), int(self.uniform() * 2)
        articles = forms.ARTICLES[language]
        return self.pick(forms.AGREEMENT[language]).format(
            a=self.pick(NOUNS[language])[subject],
            b=self.pick(NOUNS[language])[other],
            v=self.pick(VERBS[language])[subject],
            w=self.pick(facts.words[f"adverbs_{language}"]),
            c=self.pick(facts.words["colors"]),
            d=articles[subject],
            e=articles[other],
        )

    # --- copying

    def indirect_object(self) -> str:
        """Two people, one of whom gives: the other receives."""
        a, b = self.generator.sample(facts.words["names"], 2)
        giver, receiver = (a, b) if self.uniform() < 0.5 else (b, a)
        gaps = {"p": self.pick(facts.words["places"]), "o": self.pick(facts.words["objects"])}
        return self.pick(forms.INDIRECT_OBJECT).format(a=a, b=b, s=giver, i=receiver, **gaps)

    def induction(self) -> str:
        """A random sequence that starts again, or a fact of a person that is asked again."""
        return self.sequence_again() if self.uniform() < 0.55 else self.told_again()

    def told_again(self) -> str:
        """Facts of two or three persons, and one of them asked again.

        Only one is asked: the last of several could be found by elimination, without knowing whose fact is whose, and
        a model that can eliminate learns the rest late or never.
        """
        count = 2 if self.uniform() < 0.6 else 3
        people = self.generator.sample(facts.words["names"], count)
        coded = self.uniform() < 0.5
        things = self.generator.sample(facts.nonsense if coded else facts.words["objects"], count)
        told, asked = forms.TOLD_AND_ASKED[coded]
        said = [told.format(n=person, w=thing) for person, thing in zip(people, things, strict=True)]
        again = int(self.uniform() * count)
        return " ".join([*said, asked.format(n=people[again], w=things[again])])

    def sequence_again(self) -> str:
        """Random words in a row, and again from somewhere in it."""
        length = 3 + int(self.uniform() * 6)
        between = int(self.uniform() * 4) if self.uniform() < 0.5 else 0
        drawn = self.generator.sample(facts.nonsense, length + between)
        items, middle = drawn[:length], drawn[length:]
        if self.uniform() < 0.6:
            for i in range(length):
                if self.uniform() < 0.4 and (word := self.pick(COPIED)) not in drawn and word not in items:
                    items[i] = word
        start = int(self.uniform() * (length - 1)) if self.uniform() < 0.4 else 0
        return " ".join([*items, *middle, items[start], *(f"*{word}" for word in items[start + 1 :]), "."])

    # --- numbers and orders

    def comparison(self, held_out: bool = False) -> str:
        """The larger or smaller of two numbers, from inside or outside the split."""
        while True:
            a = int(self.uniform() * (LARGEST + 1))
            near = min(LARGEST, max(0, a + self.generator.randint(-12, 12)))
            b = int(self.uniform() * (LARGEST + 1)) if self.uniform() < 0.6 else near
            if a != b and splits.is_comparison(a, b) == held_out:
                return self._compared(a, b)

    def comparison_of_near(self) -> str:
        """The larger or smaller of two numbers that differ little, but by more than 1, outside the split."""
        least, greatest = NEAR
        while True:
            a = int(self.uniform() * (LARGEST + 1))
            difference = least + int(self.uniform() * (greatest - least + 1))
            b = a + difference * (1 if self.uniform() < 0.5 else -1)
            if 0 <= b <= LARGEST and not splits.is_comparison(a, b):
                return self._compared(a, b)

    def _compared(self, a: int, b: int) -> str:
        return self.compared(a, b, int(self.uniform() * len(forms.COMPARISON)))

    def compared(self, a: int, b: int, form: int) -> str:
        """The comparison of two numbers in a given form, held out or not."""
        answers = (max(a, b), min(a, b), "greater" if a > b else "lesser", "yes" if a > b else "no")
        return forms.COMPARISON[form].format(a=a, b=b, v=answers[form])

    def greater_than(self) -> str:
        """A range whose end is any number above its start."""
        if self.uniform() < 0.4:
            a = 10 + int(self.uniform() * 88)
            template, century = self.pick(forms.GREATER_THAN_YEARS), 11 + int(self.uniform() * 10)
        else:
            a = int(self.uniform() * (LARGEST - 1))
            template, century = self.pick(forms.GREATER_THAN), 0
        return template.format(a=a, b=a + 1 + int(self.uniform() * (LARGEST - a)), c=century)

    def sum(self, held_out: bool = False) -> str:
        """A sum of at most 99, from inside or outside the split."""
        while True:
            a = int(self.uniform() * (LARGEST + 1))
            b = int(self.uniform() * (LARGEST + 1 - a))
            if self.uniform() < 0.5:
                a, b = b, a
            if splits.is_sum(a, b) == held_out:
                return self.pick(forms.SUM).format(a=a, b=b, v=a + b)

    def succession(self) -> str:
        """The next or previous number, day or month."""
        kind = self.uniform()
        if kind < 0.35:
            a = int(self.uniform() * (LARGEST - 1)) + 1
            template, step = self.pick(forms.NUMBER_STEPS)
            return template.format(a=a, b=a + step)
        name, steps = self.pick((("days", forms.DAY_STEPS), ("months", forms.MONTH_STEPS)))
        language = self.pick(("English", "English", "French", "Spanish"))
        order = facts.words[f"{name}_{language}"]
        i = int(self.uniform() * len(order))
        if kind < 0.6:
            ahead = 2 + int(self.uniform() * 3)
            words = [order[i], order[(i + 1) % len(order)]]
            words += [f"*{order[(i + j) % len(order)]}" for j in range(2, ahead + 1)]
            return " ".join(words) + " ."
        template, step = self.pick(steps[language])
        return template.format(a=order[i], b=order[(i + step) % len(order)])
