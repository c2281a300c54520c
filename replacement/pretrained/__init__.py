"""Models that ship with the package: a folder per model, in the Hugging Face layout, with its dictionaries inside.

Knows where the folders are, and nothing of how to load them.
"""

from __future__ import annotations

from pathlib import Path

from replacement.errors import InputError

_HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the models that ship with the package."""
    return tuple(sorted(path.parent.name for path in _HERE.glob("*/config.json")))


def directory(name: str) -> Path:
    """Folder of the model called `name`; raises `InputError` if none of that name ships."""
    if name not in names():
        known = ", ".join(names()) or "none"
        raise InputError(
            f"directory(name={name!r}): no such model ships; have: {known}; pass a path or a hub id instead"
        )
    return _HERE / name
