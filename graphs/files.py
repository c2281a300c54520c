"""Write a file whole or not at all, by rename. Knows nothing of what is written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graphs.errors import InputError


@contextmanager
def whole_file(path: str | os.PathLike[str], *, call: str) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends well, and is removed when it doesn't.

    `call` names the public function in the message. Raises InputError where the folder is missing or can't be written.
    """
    target = Path(path)
    try:
        is_folder, has_folder = target.is_dir(), target.parent.is_dir()
    except OSError as problem:  # a name too long
        raise InputError(
            f"{call}(path={str(target)[:80]!r}...): can't write there ({problem.strerror}); choose another path"
        ) from problem
    if is_folder:
        raise InputError(f"{call}(path={str(target)!r}): is a folder, needs a file; add a file name")
    if not has_folder:
        raise InputError(
            f"{call}(path={str(target)!r}): the folder {str(target.parent)!r} does not exist; create it first"
        )
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield draft
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, target)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise InputError(
            f"{call}(path={str(target)!r}): can't write there ({reason}); choose another path"
        ) from problem
    finally:
        draft.unlink(missing_ok=True) if target.parent.is_dir() else None
