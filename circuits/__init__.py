"""Circuit tracing: attribution graphs of language models whose MLPs are replaced by sparse dictionaries.

Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "Direction": "circuits.targets",
    "Feature": "circuits.targets",
    "Intervention": "circuits.intervention",
    "attribute": "circuits.attribution",
    "intervene": "circuits.intervention",
}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'circuits' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
