"""Documents of token ids for training, evaluation and labelling.

A document is random sentences one after another, cut at the length; nothing is stored and nothing is tokenized: words
become ids by look-up, and a test holds that the tokenizer reads the same ids from the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from replacement.pretrained.recipe.sentences import AS_USUAL, Sentences
from replacement.pretrained.recipe.vocabulary import BOS, word_ids

DOCUMENT_LENGTH = 64
"""Tokens that the model reads of one document, the first one BOS."""
_ANSWER = 1 << 16


class Batch(NamedTuple):
    """Documents with one token more than the model reads, so that inputs and targets are shifts of one array."""

    tokens: Int64[Tensor, "documents length+1"]
    """Token ids; the first of each row is BOS."""
    answer: Bool[Tensor, "documents length+1"]
    """Where a token is an answer: it follows from what stands before it."""


@cache
def marked_ids() -> dict[str, int]:
    """Id of every word, and of every word marked as an answer with a bit above the ids."""
    ids = word_ids()
    return {**ids, **{f"*{word}": index | _ANSWER for word, index in ids.items()}}


class Corpus:
    """An endless stream of documents; the same `seed` gives the same stream. weights: as of `Sentences`."""

    def __init__(self, seed: int, *, weights: Mapping[str, int] = AS_USUAL) -> None:
        self.sentences = Sentences(seed, weights=weights)

    def batch(self, documents: int, length: int = DOCUMENT_LENGTH) -> Batch:
        """The next `documents` documents of `length` + 1 tokens."""
        return written(self.sentences.draw, documents, length)


def written(draw: Callable[[], str], documents: int, length: int = DOCUMENT_LENGTH) -> Batch:
    """`documents` documents of `length` + 1 tokens from sentences as `draw` gives them."""
    ids, bos = marked_ids(), word_ids()[BOS]
    table = np.empty((documents, length + 1), dtype=np.int64)
    for row in table:
        document = [bos]
        while len(document) <= length:
            document += [ids[word] for word in draw().split()]
        row[:] = document[: length + 1]
    return Batch(torch.from_numpy(table & (_ANSWER - 1)), torch.from_numpy(table >= _ANSWER))
