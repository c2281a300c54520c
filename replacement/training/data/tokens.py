"""Batches of token ids by number: from packed documents, from a stream that is tokenized as far as it is read, and from
the generator behind the shipped model `atlas`.

Batch n is the same whenever it is asked for. Knows nothing of activations.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from replacement.errors import InputError
from replacement.training.data.packing import SPLITS, TokenStore

_ATLAS_SEEDS = {"train": 200_000_000, "held_out": 100_000_000}
"""First seed of each split; no other use of the generator comes near them."""
_ATLAS_SEED_STEP = 1_000_000_000


class TokenSource(Protocol):
    """Random access to batches of rows of token ids."""

    context: int  #: tokens of a row
    n_documents: int | None  #: rows of one epoch; None where that is not known or there is no end
    fingerprint: str  #: what the rows are a function of

    def batch(self, index: int, documents: int) -> Int64[Tensor, "documents pos"]:
        """The index-th batch of that many rows, the start token first where the model has one."""
        ...


class PackedTokens:
    """Rows of a finite set of documents, every row once an epoch, each epoch in an order of its own."""

    def __init__(self, store: TokenStore, *, split: str, seed: int) -> None:
        """Tokenize what is not tokenized yet; raises `InputError` where that gives no row."""
        store.grow(split)
        require_rows(store, split)
        self.store, self.split, self.seed, self.context = store, split, seed, store.context
        self.n_rows = store.n_rows(split)
        self.n_documents: int | None = self.n_rows
        self.fingerprint = f"{store.folder.name} {split} {seed}"
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, index: int, documents: int) -> Int64[Tensor, "documents pos"]:
        """The index-th batch; what one epoch does not fill is filled from the next."""
        first = index * documents
        rows: list[int] = []
        while len(rows) < documents:
            epoch, place = divmod(first + len(rows), self.n_rows)
            rows += self._epoch_order(epoch)[place : place + documents - len(rows)].tolist()
        return self.store.read(self.split, np.array(rows))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.n_rows)
        return self._order


class StreamedTokens:
    """Rows of documents that are tokenized only as far as batches ask; in the documents' order, over and over."""

    n_documents: int | None = None

    def __init__(self, store: TokenStore, *, split: str) -> None:
        """Tokenize until the split has a row; raises `InputError` where the documents end before."""
        store.grow(split, 1)
        require_rows(store, split)
        self.store, self.split, self.context = store, split, store.context
        self.fingerprint = f"{store.folder.name} {split}"

    def batch(self, index: int, documents: int) -> Int64[Tensor, "documents pos"]:
        """The index-th batch, tokenized now if no one has asked for it before."""
        rows = np.arange(index * documents, (index + 1) * documents)
        self.store.grow(self.split, int(rows[-1]) + 1)
        return self.store.read(self.split, rows % self.store.n_rows(self.split))


class AtlasTokens:
    """Documents that the generator behind `atlas` writes as they are asked for: endless, never the same one twice."""

    n_documents: int | None = None

    def __init__(self, model: Any, *, context: int, split: str, seed: int, changed: bool = False) -> None:
        """changed: text of the world with changed facts, which the recipe's `finetune` learns from.

        Raises `InputError` unless the model has atlas's vocabulary.
        """
        from replacement.pretrained.recipe.corpus import written
        from replacement.pretrained.recipe.finetune import ChangedSentences
        from replacement.pretrained.recipe.sentences import Sentences
        from replacement.pretrained.recipe.vocabulary import BOS, word_ids

        tokenizer = model.tokenizer
        if tokenizer is None or len(tokenizer) != len(word_ids()) or tokenizer.bos_token_id != word_ids()[BOS]:
            raise InputError(
                f"open_tokens(data='atlas', model={model.cfg.model_name!r}): its texts are in the vocabulary of the "
                "model atlas only; pass a text file, a .jsonl file or hf:owner/name"
            )
        self._sentences, self._written, self.context = ChangedSentences if changed else Sentences, written, context
        self.first_seed = _ATLAS_SEEDS[split] + _ATLAS_SEED_STEP * seed
        self.fingerprint = f"{'atlas-changed' if changed else 'atlas'} {self.first_seed} {context}"

    def batch(self, index: int, documents: int) -> Int64[Tensor, "documents pos"]:
        """The index-th batch; its documents are drawn from a seed of its own."""
        return self._written(self._sentences(self.first_seed + index).draw, documents, self.context - 1).tokens


def require_rows(store: TokenStore, split: str) -> None:
    """Raise `InputError` where a split of a finished store has no row."""
    if store.n_rows(split):
        return
    counts = ", ".join(f"{store.n_documents(one)} {one.replace('_', ' ')}" for one in SPLITS)
    raise InputError(
        f"{store.documents.name}: its {split.replace('_', ' ')} documents do not fill a row of {store.context} tokens "
        f"(documents: {counts}); give more text or a smaller context"
    )
