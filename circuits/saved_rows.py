"""Rows of a trace that goes on, on disk, so that a stopped trace need not begin anew.

A folder of numbered safetensors files, each with the rows since the last one, each whole or not there; their headers
say which trace they belong to. Knows blocks of rows and files; nothing of how rows are computed, or in which order.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, NoReturn

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_array

from circuits.rows import Block
from graphs.errors import InputError as FileError
from graphs.files import whole_file
from replacement.errors import InputError

FORMAT = "rows 2"
EVERY = 30.0  #: seconds between two files
PATIENCE = 20  #: but at least so many times as long as the last one took to write
WORTH = 1.0  #: seconds of work that are kept when the trace is interrupted
LATE = 10.0  #: and when its rows are all there, as the graph is made out of them
OWN = re.compile(r"\d{5}\.safetensors|\.\d{5}\.safetensors\.[0-9a-f]+\.part")  #: names of rows and their drafts
LOCK = "lock"  #: a file that the trace which writes here holds


class Identity(NamedTuple):
    """What tells one trace from another; the first thing that differs is named when rows are refused."""

    named: Mapping[str, Any]
    """JSON values that have to be equal, `sources`, the number of columns, among them."""
    measured: Mapping[str, float]
    """Numbers that have to be equal but for rounding."""
    alike: float
    """Relative difference that is rounding."""


class SavedRows:
    """Where a trace keeps its rows until its graph is made; they are an insurance, and no trace ends for want of it."""

    def __init__(self, folder: str | Path, *, resume: bool = False, say: Callable[[str], None] | None = None) -> None:
        """folder: the rows' own; is made when the first are written. resume: go on from the rows that are there.

        say: is told, once, why rows can't be kept; None: a line on standard error.
        """
        self.folder, self.resume, self._say = Path(folder), resume, say or _on_stderr
        self.identity = Identity({}, {}, 0.0)
        self.waiting: deque[Block] = deque()  # what an earlier run left, in its order
        self._files = self._kept = self._rows = self._batch_size = 0  # files; blocks, rows in them; rows of a sweep
        self._written, self._pause, self._stopped = monotonic(), EVERY, False
        self._lock = FileLock(self.folder / LOCK, timeout=0)

    def begin(self, identity: Identity, batch_size: int) -> int:
        """Say what trace this is, and how many rows its sweeps can have; returns how many they are to have.

        Reads the rows of an earlier run where it is to go on, in batches of the same size unless that is too much now.
        Raises InputError where they belong to another trace, or another process goes on from them at this moment.
        """
        self.identity = Identity(*json.loads(json.dumps(identity)))
        paths = self._paths() if self.resume else []
        if paths and not self._locked():
            raise InputError(
                f"--resume: another trace writes rows in {str(self.folder)!r}; wait for its end, or stop it"
            )
        self._batch_size = batch_size
        try:
            for path in paths:
                self.waiting += self._read(path)
        except InputError:
            self._unlock()
            raise
        self._files, self._kept, self._written = len(paths), len(self.waiting), monotonic()
        self._rows = sum(len(block.index) for block in self.waiting)
        self._batch_size = min(batch_size, self._batch_size)
        return self._batch_size

    @property
    def empty(self) -> bool:
        """Whether no stopped trace has left rows."""
        return not self._paths()

    @property
    def next_rows(self) -> int | None:
        """How many rows the earlier run's next block has; None where there is none."""
        return len(self.waiting[0].index) if self.waiting else None

    def next(self, depth: int, index: Int[np.ndarray, " n"], *, of_targets: bool) -> Block | None:
        """The earlier run's rows of these targets or features; None where it did not come so far."""
        if not self.waiting:
            return None
        block = self.waiting.popleft()
        if (block.depth, block.of_targets) != (depth, of_targets) or not np.array_equal(block.index, index):
            self._refuse(self.folder, "were computed in another order, as on another machine")
        return block

    def keep(self, blocks: Sequence[Block]) -> None:
        """Write the blocks that are not on disk yet, where the last time is long enough ago."""
        if monotonic() - self._written >= self._pause:
            self._insure(blocks)

    @contextmanager
    def insured(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Around all that computes blocks or uses them up, from the last on: where it stops, they stay on disk.

        Ctrl-C comes out with a text that says how the trace goes on, "" where there is nothing to go on from.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self._kept < len(blocks) and monotonic() - self._written >= WORTH:
                self._insure(blocks)
            raise KeyboardInterrupt(self.left()) from None
        except BaseException:
            self._unlock()
            raise

    def settle(self, blocks: Sequence[Block]) -> None:
        """Write what is not on disk when all rows are there, where it took long."""
        if self._kept < len(blocks) and monotonic() - self._written >= LATE:
            self._insure(blocks)

    def left(self) -> str:
        """Let go of the folder; what is on disk, and how to go on from it, "" where nothing is."""
        self._unlock()
        if not self._kept:
            return ""
        return f"{self._rows:,} rows are kept in {self.folder}; the same command with --resume goes on from there"

    def remove(self) -> None:
        """Take away the rows, and their folder where nothing else is in it; not those that another trace writes."""
        if not self.folder.is_dir() or not self._locked():
            return
        try:
            self._clear()
        except OSError as problem:
            self._say(f"rows can't be removed from {self.folder} ({problem.strerror})")
        self._unlock()
        self._leave()

    # ---- the folder

    def _locked(self) -> bool:
        """Whether nobody else writes here, nor will until `_unlock`."""
        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout:
            return False
        except (NotImplementedError, OSError):
            pass  # a file system without locks, or one that can't be written, which writing will say
        return True

    def _unlock(self) -> None:
        if self._lock.is_locked:
            with suppress(OSError):  # the file is of no meaning once nobody holds it
                (self.folder / LOCK).unlink(missing_ok=True)
            self._leave()
            self._lock.release()

    def _leave(self) -> None:
        with suppress(OSError):  # something is in it, or there is none
            self.folder.rmdir()

    def _clear(self) -> None:
        for path in [*self.folder.iterdir()]:  # drafts of a run that was killed too
            if OWN.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _insure(self, blocks: Sequence[Block]) -> None:
        """Write, unless that has failed before: then the trace goes on without."""
        if self._stopped:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._locked():
                raise OSError("another trace writes there")
            self._write(blocks)
        except (OSError, FileError) as problem:
            self._stopped = True
            cause = problem.__cause__ if isinstance(problem, FileError) else problem
            reason = getattr(cause, "strerror", None) or str(cause)
            self._say(f"rows can't be kept in {self.folder} ({reason}); the trace goes on, but not after a stop")

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.safetensors") if OWN.fullmatch(path.name))

    def _write(self, blocks: Sequence[Block]) -> None:
        started = monotonic()
        if not self._files:
            self._clear()
        new = blocks[self._kept :]
        head = [(block.depth, block.of_targets, len(block.index), block.rows.nnz, block.share) for block in new]
        header = {"format": FORMAT, "first": self._kept, "identity": self.identity, "blocks": head}
        header["batch_size"] = self._batch_size
        columns = {
            "index": [block.index for block in new],
            "starts": [block.rows.indptr for block in new],
            "weights": [block.rows.data for block in new],
            "sources": [block.rows.indices for block in new],
            "sums": [block.sums for block in new],
            "constants": [block.constants for block in new],
        }
        with whole_file(self.folder / f"{self._files:05}.safetensors", call="trace") as draft:
            tensors = {name: np.concatenate(parts) for name, parts in columns.items()}
            try:
                save_file(tensors, draft, metadata={"rows": json.dumps(header)})
            except SafetensorError as problem:  # its way to say that the disk is full
                raise OSError(str(problem)) from problem
        self._files, self._kept = self._files + 1, self._kept + len(new)
        self._rows += sum(len(block.index) for block in new)
        self._written = monotonic()
        self._pause = max(EVERY, PATIENCE * (self._written - started))

    def _read(self, path: Path) -> list[Block]:
        try:
            with safe_open(str(path), framework="np") as stored:
                header = json.loads((stored.metadata() or {})["rows"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            blocks = _blocks(header["blocks"], tensors, int(header["identity"][0]["sources"]))
            self._batch_size = int(header["batch_size"])
            whole = header["format"] == FORMAT and header["first"] == len(self.waiting)
        except (SafetensorError, OSError, LookupError, TypeError, ValueError) as problem:
            self._refuse(path, f"can't be read ({str(problem).splitlines()[0]})")
        if not whole:
            self._refuse(path, "are of another version, or some before them are missing")
        self._check(path, Identity(*header["identity"]))
        return blocks

    def _check(self, path: Path, found: Identity) -> None:
        for name in {**self.identity.named, **found.named}:
            ours, theirs = self.identity.named.get(name), found.named.get(name)
            if ours != theirs:
                short = all(len(str(one)) <= 30 and not isinstance(one, list) for one in (ours, theirs))
                said = f"{name} {theirs!r}, not {ours!r}" if short else f"another {name}"
                self._refuse(path, f"are of another trace ({said})")
        for name, number in self.identity.measured.items():
            if not math.isclose(number, found.measured.get(name, math.nan), rel_tol=self.identity.alike):
                self._refuse(path, f"are of another trace (other {name}: the weights have changed)")

    def _refuse(self, path: Path, what: str) -> NoReturn:
        raise InputError(f"--resume: the rows in {str(path)!r} {what}; leave --resume out to trace anew")


def _on_stderr(text: str) -> None:
    print(f"circuits: {text}", file=sys.stderr)


def _blocks(head: Sequence[Any], tensors: Mapping[str, np.ndarray], n_sources: int) -> list[Block]:
    blocks = []
    row = entry = 0
    for number, (depth, of_targets, n_rows, n_entries, share) in enumerate(head):
        rows, entries = slice(row, row + n_rows), slice(entry, entry + n_entries)
        starts = tensors["starts"][row + number : row + number + n_rows + 1]
        parts = (tensors["weights"][entries], tensors["sources"][entries], starts)
        kept = csr_array(parts, shape=(n_rows, n_sources))
        kept.check_format(full_check=True)
        sums, constants = tensors["sums"][rows], tensors["constants"][rows]
        blocks.append(Block(depth, of_targets, tensors["index"][rows], kept, sums, constants, share))
        row, entry = row + n_rows, entry + n_entries
    return blocks
