"""Documents packed into rows of token ids, in files that are mapped into memory and grow as rows are asked for.

A folder holds `train.npy` and `held_out.npy` (plain numpy files, one row of `context` ids after another) and
`state.json`, which appears by rename after every block of documents and says how many rows are valid: a build that is
killed goes on from there. Knows where texts come from only as `Documents`, and nothing of the order rows are read in.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from jaxtyping import Int64
from torch import Tensor, from_numpy

from replacement.errors import InputError
from replacement.starts import start_token
from replacement.training.data.texts import Documents

SPLITS = ("train", "held_out")
HELD_OUT_SHARE = 0.05
"""Share of the documents that is held out; which ones is a hash of the text, so equal texts are on one side."""
_BLOCK_CHARACTERS = 1 << 20
_MOST_UNKNOWN = 0.5


@dataclass(frozen=True)
class Encoder:
    """A model's tokenizer, as far as rows of ids need it."""

    tokenizer: Any
    start: int | None
    """Id that every row begins with and that stands before every document, None where the model has none."""
    n_vocabulary: int
    """Ids that the model can read."""

    @classmethod
    def of(cls, model: Any) -> Encoder:
        """The encoder of a TransformerBridge; the start token is the one that prompts begin with when traced."""
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise InputError(f"open_tokens(model={model.cfg.model_name!r}): has no tokenizer; boot it with one")
        return cls(tokenizer, start_token(tokenizer), int(model.cfg.d_vocab))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, the start token first; raises `InputError` for an id that the model cannot read."""
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        first = [] if self.start is None else [self.start]
        ids = [np.array([*first, *row], dtype=np.int64) for row in found["input_ids"]]
        highest = max((int(row.max()) for row in ids if len(row)), default=0)
        if highest >= self.n_vocabulary:
            raise InputError(
                f"open_tokens: the tokenizer gives id {highest}, the model reads 0 to {self.n_vocabulary - 1}; "
                "boot the model with its own tokenizer"
            )
        return ids

    def fingerprint(self) -> str:
        """Changes whenever a text could become other ids."""
        if self.tokenizer.is_fast:
            content = json.loads(self.tokenizer.backend_tokenizer.to_str())
            content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        else:
            content = [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        return hashlib.sha256(json.dumps([content, self.start], sort_keys=True).encode()).hexdigest()


@dataclass
class _Part:
    """One split's share of a state."""

    rows: int = 0
    documents: int = 0
    carry: list[int] = field(default_factory=list)  #: ids that do not fill a row yet


@dataclass
class _State:
    documents: int = 0  #: documents read, empty ones among them
    tokens: int = 0
    unknown: int = 0
    finished: bool = False
    parts: dict[str, _Part] = field(default_factory=lambda: {split: _Part() for split in SPLITS})


class TokenStore:
    """Rows of `context` ids of all documents, by split.

    A row is the start token and the `context - 1` ids that come next; the start token also stands between documents.
    Ids that do not fill a last row are left out. Several processes can share a folder: one of them tokenizes at a time.
    """

    def __init__(self, folder: Path, documents: Documents, encoder: Encoder, *, context: int) -> None:
        """Open the folder, or start it; raises `InputError` where it cannot be written or is damaged."""
        self.folder, self.documents, self.encoder, self.context = folder, documents, encoder, context
        self.dtype = np.dtype("<u2" if encoder.n_vocabulary <= 1 << 16 else "<u4")
        self._texts: Iterator[str] = iter(())
        self._place = -1  #: documents that `_texts` has given
        with _Writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._state = self._read_state()

    @property
    def finished(self) -> bool:
        """Whether all documents are in."""
        return self._state.finished

    def n_rows(self, split: str) -> int:
        """Rows of a split so far."""
        return self._state.parts[split].rows

    def n_documents(self, split: str) -> int:
        """Documents of a split so far."""
        return self._state.parts[split].documents

    def grow(self, split: str, rows: int | None = None) -> None:
        """Tokenize on until the split has that many rows or the documents end; None goes to the end.

        Raises `InputError` where the documents hold no text, mostly unknown words, or the disk is full.
        """
        if self._enough(split, rows):
            return
        with _Writing(self.folder), FileLock(self.folder / "lock"):
            self._state = self._read_state()  # another process may have gone on
            while not self._enough(split, rows):
                self._add_block()

    def read(self, split: str, rows: np.ndarray) -> Int64[Tensor, "rows pos"]:
        """The rows of these numbers."""
        header = len(self._header(0))
        shape = (self.n_rows(split), self.context)
        table = np.memmap(self._path(split), self.dtype, mode="r", offset=header, shape=shape)
        return from_numpy(table[rows].astype(np.int64))

    def _enough(self, split: str, rows: int | None) -> bool:
        return self._state.finished or (rows is not None and self.n_rows(split) >= rows)

    def _add_block(self) -> None:
        """Read, tokenize and store some documents."""
        state = self._state
        texts, last = self._next_texts(state.documents)
        new = self._pack([text for text in texts if text])
        if last and not state.tokens:
            raise InputError(f"{self.documents.name}: is empty; needs at least one document of text")
        state.documents, state.finished = state.documents + len(texts), last
        for split, rows in new.items():
            self._append(split, rows)
        self._write_state()
        self._place = state.documents

    def _next_texts(self, start: int) -> tuple[list[str], bool]:
        """A block of texts from number `start` on, and whether it is the last."""
        if self._place != start:
            self._texts = self.documents.read(start)
        self._place = -1  # until the block is stored: after an error the texts are opened anew
        texts, characters = [], 0
        try:
            for text in self._texts:
                texts.append(text.strip())
                characters += len(text)
                if characters >= _BLOCK_CHARACTERS:
                    return texts, False
        except OSError as error:
            raise InputError(f"{self.documents.name}: cannot be read ({error.strerror or error})") from error
        return texts, True

    def _pack(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """New rows of both splits; counts documents and tokens, and keeps what does not fill a row."""
        state = self._state
        ids: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        for text, row in zip(texts, self.encoder.encode(texts) if texts else (), strict=True):
            split = split_of(text)
            ids[split].append(row)
            state.parts[split].documents += 1
            state.tokens += len(row) - (self.encoder.start is not None)  # which is no word
            unknown = self.encoder.tokenizer.unk_token_id
            state.unknown += 0 if unknown in (None, self.encoder.start) else int((row == unknown).sum())
        if state.unknown > _MOST_UNKNOWN * state.tokens:
            raise InputError(
                f"{self.documents.name}: {state.unknown / state.tokens:.0%} of its tokens are words that the model's "
                "vocabulary lacks; pass other text or another model"
            )
        packed = {}
        for split in SPLITS:
            stream = np.concatenate([np.array(state.parts[split].carry, dtype=np.int64), *ids[split]])
            packed[split], rest = pack(stream, context=self.context, start=self.encoder.start)
            state.parts[split].carry = rest.tolist()
        return packed

    def _append(self, split: str, rows: np.ndarray) -> None:
        part, path = self._state.parts[split], self._path(split)
        header = self._header(part.rows + len(rows))
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.truncate(len(header) + part.rows * self.context * self.dtype.itemsize)  # what a killed run left
            file.seek(0, os.SEEK_END)
            file.write(rows.astype(self.dtype).tobytes())
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        part.rows += len(rows)

    def _header(self, rows: int) -> bytes:
        """The head of a .npy file; numpy pads it so that its length does not depend on the number of rows."""
        head = io.BytesIO()
        shape = (rows, self.context)
        np.lib.format.write_array_header_1_0(head, {"descr": self.dtype.str, "fortran_order": False, "shape": shape})
        return head.getvalue()

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.npy"

    def _read_state(self) -> _State:
        path = self.folder / "state.json"
        if not path.is_file():
            return _State()
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["parts"] = {split: _Part(**stored["parts"][split]) for split in SPLITS}
            state = _State(**stored)
            for split, part in state.parts.items():
                expected = len(self._header(part.rows)) + part.rows * self.context * self.dtype.itemsize
                if self._path(split).stat().st_size < expected:
                    raise ValueError(f"{split}.npy is shorter than {part.rows} rows")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.folder}: these cached tokens are damaged ({error}); delete the folder") from error
        return state

    def _write_state(self) -> None:
        draft = self.folder / "state.json.part"
        draft.write_text(json.dumps(asdict(self._state)), encoding="utf-8")
        os.replace(draft, self.folder / "state.json")


class Packed(NamedTuple):
    """Ids as rows, and what is left."""

    rows: np.ndarray  #: [rows, context]
    rest: np.ndarray


def pack(stream: np.ndarray, *, context: int, start: int | None) -> Packed:
    """A stream of ids cut into rows, each beginning with the start token, which is not doubled where it stands."""
    rows, place = [], 0
    while True:
        lead = start is not None and place < len(stream) and bool(stream[place] != start)
        end = place + context - lead
        if end > len(stream):
            break
        rows.append(np.concatenate([[start], stream[place:end]]) if lead else stream[place:end])
        place = end
    return Packed(np.array(rows, dtype=np.int64).reshape(len(rows), context), stream[place:])


def split_of(text: str) -> str:
    """The split of a document: held out where the CRC-32 of its text is in the lowest `HELD_OUT_SHARE`."""
    return SPLITS[zlib.crc32(text.encode()) < HELD_OUT_SHARE * 2**32]


class _Writing:
    """Turns an operating system's error into one line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise InputError(
                f"{self.folder}: cannot be written ({error.strerror or error}); free space there, or "
                "have it elsewhere (XDG_CACHE_HOME); what was tokenized so far is kept"
            ) from error
