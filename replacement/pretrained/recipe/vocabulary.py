"""The closed vocabulary: every word that a sentence can hold, in a fixed order.

Names are kept as people write them (`Dallas`, `New York`); all other words are lower case. Knows nothing of ids in
text: `tokenizer.py` reads text, `corpus.py` turns sentences into ids.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import chain

from replacement.pretrained.recipe import facts
from replacement.pretrained.recipe import templates as forms
from replacement.pretrained.recipe.sentences import LARGEST

PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
SPECIAL = (PAD, BOS, UNKNOWN)


def _template_words() -> list[str]:
    def texts(item: object) -> list[str]:
        if isinstance(item, str):
            return [item]
        if isinstance(item, dict):
            return [text for value in item.values() for text in texts(value)]
        return [text for value in item for text in texts(value)] if isinstance(item, tuple | list) else []

    public = [value for name, value in sorted(vars(forms).items()) if name.isupper() and name[0] != "_"]
    words = {word for text in texts(public) for word in text.split() if "{" not in word}
    return sorted(words | {"state", "country", "greater", "lesser", "yes", "no"})


@cache
def vocabulary() -> tuple[str, ...]:
    """Every token as it is shown; the position is the id."""
    places = [
        text
        for place in (*facts.states, *facts.countries)
        for text in chain.from_iterable((field,) if isinstance(field, str) else field for field in place)
    ]
    pairs = [word for entry in facts.antonyms for pair in entry.values() for word in pair]
    lists = [word for name, words in facts.words.items() if not name.startswith("syllables") for word in words]
    inflected = [
        form
        for language in facts.LANGUAGES
        for kind in ("noun", "verb")
        for forms_ in facts.inflections(language, kind)
        for form in forms_
    ]
    numbers = [str(number) for number in range(LARGEST + 1)]
    everything = (*SPECIAL, *numbers, *places, *pairs, *lists, *inflected, *facts.LANGUAGES, *facts.nonsense)
    tokens = tuple(dict.fromkeys((*everything, *_template_words())))
    check_case(tokens)
    return tokens


@cache
def postal_codes() -> frozenset[str]:
    """The states' postal codes, read as such only in capitals: many are words in lower case (`in`, `me`, `or`)."""
    return frozenset(state.abbreviation for state in facts.states)


def check_case(tokens: tuple[str, ...]) -> None:
    """Raise an AssertionError where two tokens differ in case only; postal codes are exempt."""
    shown: dict[str, str] = {}
    for token in tokens:
        if token not in postal_codes():
            assert token.lower() not in shown, f"{token!r} and {shown[token.lower()]!r} differ in case only"
            shown[token.lower()] = token


def is_plain(token: str) -> bool:
    """Whether the word-level model reads the token by itself: lower case, one run of letters or digits, or one sign."""
    return token == token.lower() and re.fullmatch(r"\w+|[^\w\s]", token) is not None


@cache
def word_ids() -> dict[str, int]:
    """Id of every word as sentences write it: names joined by underscores, other words in lower case."""
    return {token.replace(" ", "_"): index for index, token in enumerate(vocabulary())}
