"""The words of a model's vocabulary, each run alone: what first-letter absorption is measured on.

Knows tokenizers and splices; nothing of letters' directions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from replacement.errors import InputError
from replacement.evaluation.absorption import AbsorptionFigures, first_letter_absorption, first_letters
from replacement.evaluation.splicing import Splice, encode
from replacement.evaluation.stability import write_directions
from replacement.sites import hook_name
from replacement.starts import start_token

MOST_WORDS = 5000
_BATCH = 512


def vocabulary_words(tokenizer: Any, *, limit: int = MOST_WORDS, seed: int = 0) -> dict[int, str]:
    """Tokens that are words of the letters a to z, two letters or more: id -> word, at most `limit` drawn at random."""
    special = set(tokenizer.all_special_ids)
    ids = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    words = {token: tokenizer.decode([token]).strip() for token in ids}
    kept = [token for token, letter in zip(ids, first_letters(list(words.values())).tolist(), strict=True)
            if letter >= 0 and len(words[token]) > 1]  # fmt: skip
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:limit]
    return {kept[i]: words[kept[i]] for i in sorted(order.tolist())}


def evaluate_absorption(splice: Splice, *, limit: int = MOST_WORDS, seed: int = 0) -> dict[int, AbsorptionFigures]:
    """First-letter absorption of every dictionary, by layer, on words run alone after BOS.

    The activations are those that the dictionary writes at its first layer. limit: most words of the vocabulary.
    Raises `InputError` where the tokenizer has no BOS token, or the vocabulary no words.
    """
    tokenizer = splice.bridge.tokenizer
    start = start_token(tokenizer)
    words = vocabulary_words(tokenizer, limit=limit, seed=seed)
    if start is None or not words:
        raise InputError("absorption: needs a tokenizer with a BOS token and words of the letters a to z")
    ids, letters = torch.tensor(list(words)), first_letters(list(words.values()))
    values = _run_alone(splice, ids, start)
    encodings = encode(splice.dictionaries, values)
    found = {}
    for layer, one in sorted(splice.dictionaries.by_layer.items()):
        written = values[hook_name(one.write_layers[0], one.write)]
        decoder = write_directions(one)[:, : one.d_out]
        found[layer] = first_letter_absorption(encodings[layer].cpu(), written.cpu(), decoder.cpu(), letters, seed=seed)
    return found


def _run_alone(splice: Splice, ids: Int[Tensor, " words"], start: int) -> dict[str, Tensor]:
    hooks = dict.fromkeys((*splice.reads, *splice.writes))
    values: dict[str, list[Tensor]] = {name: [] for name in hooks}
    for batch in ids.split(_BATCH):
        run = splice.original(torch.stack([torch.full_like(batch, start), batch], 1), hooks)
        for name, value in run.values.items():
            values[name].append(value[:, 1])
    return {name: torch.cat(parts) for name, parts in values.items()}
