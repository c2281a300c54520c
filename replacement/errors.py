"""The one exception that the package raises for a caller's mistake."""

from __future__ import annotations


class InputError(ValueError):
    """An argument, a file or a model cannot be used; the message says what, where and what to do, in one line."""
