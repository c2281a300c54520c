"""Labels for probes from a file: which words have a property, and which have not.

`{"colour": {"yes": ["red", "blue"], "no": ["one", "two"]}}`; without "no", every other token is a negative example.
Knows tokenizers; nothing of probes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from replacement.errors import InputError
from replacement.evaluation.sample import Labelling


def read_labels(path: Path, tokenizer: Any) -> dict[str, Labelling]:
    """Task -> labels of tokens: 1 for words of "yes", 0 for words of "no", -1 for others.

    A word counts where it is one token, with or without a space before it. Raises `InputError` for a file that can't be
    read, holds no task or something else, a task none of whose words is one token, or a word that is in both lists.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"--labels {str(path)!r}: not readable JSON ({problem})") from problem
    if not isinstance(given, dict) or not given or not all(_is_task(task) for task in given.values()):
        raise InputError(f'--labels {str(path)!r}: needs {{"task": {{"yes": ["word", ...], "no": ["word", ...]}}}}')
    return {name: _labelling(name, task, tokenizer, path) for name, task in given.items()}


def _is_task(task: Any) -> bool:
    return (
        isinstance(task, dict)
        and {"yes"} <= task.keys() <= {"yes", "no"}
        and all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in task.values())
    )


def _labelling(name: str, task: dict[str, list[str]], tokenizer: Any, path: Path) -> Labelling:
    ids = {key: {token: word for word in words for token in _single(word, tokenizer)} for key, words in task.items()}
    for key in task:
        if not ids[key]:
            raise InputError(f"--labels {str(path)!r}: none of the {key!r} words of {name!r} is one token of the model")
    if both := ids["yes"].keys() & ids.get("no", {}).keys():
        word = ids["yes"][min(both)]
        raise InputError(f"--labels {str(path)!r}: {name!r} has {word!r} in 'yes' and in 'no'; leave it in one of them")
    table = torch.full((len(tokenizer),), -1 if "no" in task else 0)
    table[tokenizer.all_special_ids] = -1
    for key, value in (("no", 0), ("yes", 1)):
        table[list(ids.get(key, ()))] = value
    return lambda tokens: table[tokens.cpu()]


def _single(word: str, tokenizer: Any) -> list[int]:
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")]
    return [ids[0] for ids in found if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
