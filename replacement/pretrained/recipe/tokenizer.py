"""The tokenizer of the embedded model: whole words, forgiving about case, spaces and glued punctuation.

Text is lowered, then every name in it is given the capitals that people write (`dallas` -> `Dallas`), so that the
vocabulary holds names as they are shown. A name of several words is one token. Postal codes are added tokens, which
match in capitals only. Every word outside the vocabulary becomes `<unk>`; nothing is dropped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from replacement.pretrained.recipe.corpus import DOCUMENT_LENGTH
from replacement.pretrained.recipe.vocabulary import BOS, PAD, SPECIAL, UNKNOWN, is_plain, postal_codes, vocabulary

PLAIN = (("[\u201c\u201d\u201e\u00ab\u00bb]", '"'), ("[\u2018\u2019]", "'"), (r"\s+", " "))
"""Typographic quotes and apostrophes are read as the plain ones, any run of spaces as one."""
CENTURY = r"(?<!\d)\d{2}(?=\d{2}(?!\d))"
"""The first half of a year of four digits, which is read as two numbers: `1732` -> `17 32`."""


def build() -> Tokenizer:
    """The tokenizer over `vocabulary()`, ids in its order."""
    tokens = vocabulary()
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    names = [token for token in tokens if token not in SPECIAL and token not in postal_codes() and not is_plain(token)]
    names.sort(key=len, reverse=True)  # `New York City` before `New York`
    plain = [normalizers.NFC(), *(normalizers.Replace(Regex(old), new) for old, new in PLAIN), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence([*plain, *capitals(names)])
    joined = [re.escape(name) for name in names if re.search(r"\W", name)]
    word = Regex("|".join([*joined, CENTURY, r"\w+", r"[^\w\s]"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(word, behavior="removed", invert=True)
    spaced = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace(" ' ", "'")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokens.index(BOS))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    codes = [AddedToken(code, normalized=False, single_word=True) for code in sorted(postal_codes())]
    tokenizer.add_tokens(codes)
    assert tokenizer.get_vocab_size() == len(tokens), "an added token got an id of its own"
    return tokenizer


def capitals(names: list[str]) -> list[normalizers.Replace]:
    """One rule a letter, which gives it its capital wherever it stands so in a name.

    Letter by letter, because a rule that replaced whole names would lose the tokens' offsets in the text. A rule sees
    the capitals that the rules of earlier letters have set.
    """
    places: dict[str, list[str]] = {}
    for name in names:
        for i, capital in enumerate(name):
            if capital.isupper():
                letter = capital.lower()
                seen = "".join(c if c.lower() < letter else c.lower() for c in name)
                before, after = re.escape(seen[:i]), re.escape(seen[i + 1 :])
                places.setdefault(letter, []).append(rf"(?<=\b{before}){letter}(?={after}\b)")
    return [normalizers.Replace(Regex("|".join(places[letter])), letter.upper()) for letter in sorted(places)]


def save(folder: Path) -> None:
    """Write the tokenizer's three files in the Hugging Face layout."""
    # Documents have no end; libraries that want an end token get the one that never occurs, not a new one of their own.
    special = {"bos_token": BOS, "eos_token": PAD, "pad_token": PAD, "unk_token": UNKNOWN}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": DOCUMENT_LENGTH,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
    }
    build().save(str(folder / "tokenizer.json"), pretty=False)
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
