"""Files that appear whole, by rename: one, or all of a folder together. Knows nothing of what stands in them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self


class Drafts:
    """Files of one folder that appear together, in the order in which they were begun, when the context is left.

    Until then they stand beside their places under hidden names. Where anything is raised none appears, and what was
    there before stays. Only a process that is killed between two renames leaves some of each, and none of the file that
    makes them a whole.
    """

    def __init__(self, folder: Path, *, whole: str | None = None) -> None:
        """whole: the file without which the others are worth nothing; it is away while they change."""
        self.folder, self._whole = folder, whole
        self._places: list[tuple[Path | None, Path]] = []  # draft, where it appears; None for what disappears

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A new file, open for writing; on the disk when this context is left."""
        draft = self.folder / f".{name}.{secrets.token_hex(6)}.part"
        self._places.append((draft, self.folder / name))
        with open(draft, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def drop(self, name: str) -> None:
        """Let a file that may be there disappear, in its turn."""
        self._places.append((None, self.folder / name))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._appear()
        finally:
            for draft, _ in self._places:
                if draft is not None:
                    draft.unlink(missing_ok=True)

    def _appear(self) -> None:
        """Rename all; where the first rename fails the old files stay a whole."""
        away, old = None, self.folder / self._whole if self._whole else None
        if old is not None and old.exists():
            away = self.folder / f".{old.name}.{secrets.token_hex(6)}.part"
            os.replace(old, away)
        begun = False
        try:
            for draft, place in self._places:
                if draft is None:
                    place.unlink(missing_ok=True)
                else:
                    os.replace(draft, place)
                begun = True
        finally:
            if away is not None and old is not None:
                away.unlink() if begun else os.replace(away, old)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with Drafts(path.parent) as drafts, drafts.file(path.name) as file:
        file.write(data)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left in a folder that nobody else writes to."""
    for draft in folder.glob(".*.part"):
        draft.unlink(missing_ok=True)
