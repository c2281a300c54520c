"""Prompts for graphs' scores: read from a file, and refused before the long work where the model can't take them.

Knows how a model reads words; nothing of graphs or scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from replacement.errors import InputError
from replacement.model import ReplacementModel


def read_scored_prompts(path: Path, bridge: Any, *, name: str) -> list[str]:
    """The prompts of a UTF-8 text file, one a line, blank lines skipped; a byte order mark is no part of the first.

    bridge, name: the TransformerBridge that is to read them, and what it is called. Raises `InputError` where the file
    can't be read or holds no prompt, and with the number of the line where the model can't take it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"--prompts {str(path)!r}: can't be read ({problem})") from problem
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise InputError(f"--prompts {str(path)!r}: holds no prompt; write one a line")
    places = [f"--prompts {str(path)!r}, line {number}" for number in found]
    require_prompts(list(found.values()), bridge, name=name, places=places)
    return list(found.values())


def require_prompts(
    prompts: Sequence[str | Int[Tensor, " pos"]], bridge: Any, *, name: str, places: Sequence[str] | None = None
) -> None:
    """Raise `InputError` for a prompt with an unknown word, or longer than the model's context.

    places: where each prompt comes from, for the message; None: its number.
    """
    try:
        model = ReplacementModel(bridge, (), name=name)
    except InputError:  # no prompt of this model can be traced, whichever it is
        return
    for number, prompt in enumerate(prompts):
        try:
            model.tokenize(prompt)
        except InputError as reason:
            place = f"prompt {number + 1}" if places is None else places[number]
            raise InputError(f"{place}: {str(reason).removeprefix('prompt: ')}") from reason
