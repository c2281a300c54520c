"""Reads a library function's default values from its source text, without importing it.

The command line shows and passes the library's own defaults, and `circuits --help` must not wait for torch. Knows how
Python writes functions; nothing of what they do.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def default(call: str, argument: str) -> Any:
    """Return the default of `argument` in `call`, written `"package.module:function"` or `"...:Class.method"`.

    Equals what `inspect.signature` says of the imported function, for defaults that are literals. Raises LookupError
    for a call, an argument or a default that is not there.
    """
    found = _defaults(call)
    if argument not in found:
        raise LookupError(
            f"default({call!r}, {argument!r}): no such argument with a default; it has {', '.join(found)}"
        )
    return ast.literal_eval(found[argument])


def source(module: str) -> Path:
    """The file of a module, found without importing the packages above it; raises LookupError where there is none."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        raise LookupError(f"no module {module}")
    path = Path(spec.origin)
    if rest:
        path = path.parent.joinpath(*rest)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        raise LookupError(f"no module {module}")
    return path


@cache
def _defaults(call: str) -> dict[str, ast.expr]:
    module, _, qualified = call.partition(":")
    scope: ast.AST = ast.parse(source(module).read_text(encoding="utf-8"))
    for name in qualified.split("."):
        inside = [node for node in getattr(scope, "body", []) if getattr(node, "name", None) == name]
        if not inside:
            raise LookupError(f"default({call!r}, ...): {module} has no {qualified}")
        scope = inside[-1]
    assert isinstance(scope, ast.FunctionDef)
    given = scope.args
    positional = [*given.posonlyargs, *given.args]
    pairs: list[tuple[ast.arg, ast.expr | None]] = [
        *zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True),
        *zip(given.kwonlyargs, given.kw_defaults, strict=True),
    ]
    return {argument.arg: value for argument, value in pairs if value is not None}
