"""Reads the fields of a settings dataclass from its source text: names, types, defaults and what they mean.

As `circuits.defaults` does for functions: the command line's flags are the library's fields, and `--help` must not wait
for torch. Knows how Python writes dataclasses; nothing of what the fields do.
"""

from __future__ import annotations

import ast
from functools import cache
from typing import Any, NamedTuple

from circuits.defaults import source


class Field(NamedTuple):
    """One field of a dataclass."""

    name: str
    type: str
    default: Any
    text: str  #: the docstring under it, in one line


@cache
def fields(where: str) -> tuple[Field, ...]:
    """The fields of a dataclass, written `"package.module:Class"`; raises LookupError where there is none."""
    module, _, name = where.partition(":")
    path = source(module)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise LookupError(f"fields({where!r}): no class {name} in {module}")
    out = []
    for node, after in zip(found.body, [*found.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.value is None:
            continue
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        text = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
        out.append(Field(node.target.id, ast.unparse(node.annotation), ast.literal_eval(node.value), text))
    return tuple(out)
