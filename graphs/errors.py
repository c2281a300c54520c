"""The one exception of this package: a mistake that the caller can repair. Knows nothing of graphs."""

from __future__ import annotations


class InputError(ValueError):
    """An argument or a file that can't be used, said in one line: what it got, what it needs, what to do."""
