"""What dictionaries are trained on: texts, their tokens, and a model's activations on them, live or from disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from replacement.errors import InputError
from replacement.training.data.cache import CachedActivations, open_cache, write_activations
from replacement.training.data.filling import fill_cache
from replacement.training.data.harvest import BridgeActivations, JointActivations
from replacement.training.data.packing import SPLITS, Encoder, TokenStore
from replacement.training.data.storage import storage_cost
from replacement.training.data.texts import TEXT_FIELD, HubDataset, open_documents
from replacement.training.data.tokens import AtlasTokens, PackedTokens, StreamedTokens, TokenSource

__all__ = [
    "BridgeActivations",
    "CachedActivations",
    "JointActivations",
    "TokenSource",
    "default_cache",
    "fill_cache",
    "open_cache",
    "open_tokens",
    "storage_cost",
    "write_activations",
]


def open_tokens(
    data: str,
    *,
    model: Any,
    context: int,
    split: str = "train",
    cache: Path | None = None,
    text_field: str = "text",
    seed: int = 0,
) -> TokenSource:
    """Rows of token ids of `data`, tokenized once into `cache` and mapped into memory from there.

    data: "atlas" (the generator behind the shipped model, endless), "atlas-changed" (the same with the recipe's changed
        facts), a path to a UTF-8 text file or a `.jsonl` file, or `hf:owner/name[:config][:split]`, which is tokenized
        only as far as batches are read.
    model: the TransformerBridge that is to read them.
    context: tokens of a row, the start token among them.
    split: "train" or "held_out", a twentieth of the documents, chosen by a hash of their text.
    cache: folder for tokenized texts; None takes `default_cache()`.
    text_field: field of a JSONL object or a dataset's record that holds the text.
    seed: orders the rows of each epoch, and seeds the generator.
    Raises `InputError`, one line, where data is missing, empty, unreadable or does not fit the model.
    """
    if split not in SPLITS:
        raise InputError(f"open_tokens(split={split!r}): needs one of {', '.join(SPLITS)}")
    longest = int(model.cfg.n_ctx)
    if not 2 <= context <= longest:
        raise InputError(f"open_tokens(context={context}): the model takes 2 to {longest} tokens; pass one of these")
    if data in ("atlas", "atlas-changed"):
        if text_field != TEXT_FIELD:
            raise InputError(
                f"open_tokens(data={data!r}, text_field={text_field!r}): a generator has no fields; leave it out"
            )
        return AtlasTokens(model, context=context, split=split, seed=seed, changed=data == "atlas-changed")
    documents, encoder = open_documents(data, text_field=text_field), Encoder.of(model)
    key = hashlib.sha256(json.dumps([documents.identity, encoder.fingerprint(), context]).encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(data).stem)[-40:].strip("-")
    folder = (cache or default_cache()) / f"{readable}-{key}"
    store = TokenStore(folder, documents, encoder, context=context)
    if isinstance(documents, HubDataset):
        return StreamedTokens(store, split=split)
    return PackedTokens(store, split=split, seed=seed)


def default_cache() -> Path:
    """Where tokenized texts are kept: `circuits/tokens` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "circuits" / "tokens"
