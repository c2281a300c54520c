"""Language models whose MLPs are replaced by sparse dictionaries, exactly, with explicit errors.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME_OF = {
    "Dictionary": "replacement.dictionary",
    "DictionarySet": "replacement.dictionary",
    "InputError": "replacement.errors",
    "LocalModel": "replacement.local",
    "ReplacementModel": "replacement.model",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'replacement' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
