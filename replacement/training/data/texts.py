"""Documents as text, one after another: from a text file, a JSONL file, or a Hugging Face dataset that is streamed.

Every reader takes bounded memory (one document of a file) and says where a file is wrong: the byte, or the line. Knows
nothing of tokens.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from replacement.errors import InputError
from replacement.hub import TIMEOUT

HUB_PREFIX = "hf:"
TEXT_FIELD = "text"
"""The field of a JSON object, or of a dataset's record, that is read unless another is named."""
SEPARATOR = "<|endoftext|>"
"""Ends a document of a text file."""
_BLOCK_BYTES = 1 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can say it, no tokenizer takes it
_NO_TEXT = (".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".safetensors", ".npy", ".pt", ".bin")
_LEAST_CHARACTERS, _MOST_CHARACTERS, _MARGIN = 4096, 16384, 65536


class Documents(Protocol):
    """Texts in a fixed order, which can be read from any place on."""

    name: str  #: how messages call them
    identity: str  #: what the texts are a function of; another identity, other texts

    def read(self, start: int) -> Iterator[str]:
        """The texts from number `start` on; some may be empty."""
        ...


class TextFile:
    """Documents of a UTF-8 text file.

    A document ends at `<|endoftext|>`. Where the first megabyte holds none, it also ends at the first blank line after
    4,096 characters, or else the first line end or space after 16,384.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.identity = path, str(path), _identity(path, "text")

    def read(self, start: int) -> Iterator[str]:
        """The documents from number `start` on; raises `InputError` with the byte that is not UTF-8."""
        return islice(self._split(), start, None)

    def _split(self) -> Iterator[str]:
        rest, marked = "", None
        for block in self._decoded():
            marked = SEPARATOR in block if marked is None else marked
            *documents, rest = (rest + block).split(SEPARATOR)
            yield from documents
            if not marked:
                *documents, rest = _cut(rest, margin=_MARGIN)
                yield from documents
        yield from [rest] if marked else _cut(rest, margin=0)

    def _decoded(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        with open(self.path, "rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            while True:
                pending, before = len(decoder.getstate()[0]), file.tell()
                block = file.read(_BLOCK_BYTES)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, before - pending + error.start) from error
                yield newlines.decode(text, final=not block)
                if not block:
                    return


class JSONLines:
    """Documents of a JSONL file: one JSON object a line, the text in one of its fields."""

    def __init__(self, path: Path, field: str) -> None:
        self.path, self.field, self.name, self.identity = path, field, str(path), _identity(path, f"jsonl {field}")

    def read(self, start: int) -> Iterator[str]:
        """The documents from number `start` on; raises `InputError` with the line that cannot be read."""
        return islice(self._texts(), start, None)

    def _texts(self) -> Iterator[str]:
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._text(line, number, offset)
                offset += len(line)

    def _text(self, line: bytes, number: int, offset: int) -> str:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, offset + error.start, number) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: is not JSON ({error}); each line needs one JSON object with a field {self.field!r}"
            ) from error
        return _field(record, self.field, where)


class HubDataset:
    """Documents of a Hugging Face dataset, streamed: nothing but what is read is downloaded.

    data: `hf:owner/name`, with `:config` and `:split` where they are needed (`hf:owner/name::validation`); a folder in
    place of `owner/name` is read as the same library reads it.
    """

    def __init__(self, data: str, field: str) -> None:
        self.name, self.field = data, field
        repository, _, rest = data.removeprefix(HUB_PREFIX).partition(":")
        config, _, split = rest.partition(":")
        if not repository or ":" in split:
            raise InputError(f"open_tokens(data={data!r}): needs hf:owner/name or hf:owner/name:config:split")
        self.repository, self.config, self.split = repository, config or None, split or "train"
        folder = Path(repository)
        self.revision = None if folder.is_dir() else _revision(data, repository)
        version = _identity(folder, "folder") if folder.is_dir() else self.revision
        self.identity = json.dumps([repository, config, self.split, field, version])

    def read(self, start: int) -> Iterator[str]:
        """The documents from number `start` on; raises `InputError` where they cannot be had."""
        for number, record in enumerate(self._records(start), start):
            yield _field(record, self.field, f"{self.name}, record {number}")

    def _records(self, start: int) -> Iterator[Any]:
        import datasets  # type: ignore[import-untyped]

        number = start
        try:
            found = datasets.load_dataset(
                self.repository, self.config, split=self.split, revision=self.revision, streaming=True
            )
            for record in found.skip(start):
                yield record
                number += 1
        except Exception as error:  # any transport's errors, and the library's own about configs and splits
            raise InputError(
                f"{self.name}: cannot be read after {number} records ({_reason(error)}); check the name, config and "
                "split, or run again: what was read is kept"
            ) from error


def open_documents(data: str, *, text_field: str) -> Documents:
    """The documents that `data` names: a path to a text or `.jsonl` file, or `hf:owner/name[:config][:split]`.

    text_field: the field of a JSON object or a dataset's record that holds the text. Raises `InputError` for a name
    that is none of these, or a file that is not there.
    """
    if data.startswith(HUB_PREFIX):
        return HubDataset(data, text_field)
    path = Path(data).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(
            f"open_tokens(data={data!r}): {what}; pass a text file, a .jsonl file, hf:owner/name[:config][:split], "
            "or atlas"
        )
    if path.suffix.lower() in _NO_TEXT:
        raise InputError(
            f"open_tokens(data={data!r}): is no text file; unpack it, or pass its folder as hf:FOLDER where a Hugging "
            "Face dataset can be read from it"
        )
    if path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        return JSONLines(path, text_field)
    if text_field != TEXT_FIELD:
        raise InputError(
            f"open_tokens(data={data!r}, text_field={text_field!r}): a text file has no fields; leave text_field out, "
            "or name the file .jsonl"
        )
    return TextFile(path)


def _identity(path: Path, kind: str) -> str:
    """Changes when a file is changed, or any file of a folder."""
    found = [file.stat() for file in sorted(path.rglob("*"))] if path.is_dir() else [path.stat()]
    return json.dumps([kind, str(path.resolve()), [(one.st_size, one.st_mtime_ns) for one in found]])


def _not_utf8(path: Path, offset: int, line: int | None = None) -> InputError:
    place = f", line {line}" if line else ""
    return InputError(f"{path}{place}: is not UTF-8 text at byte {offset}; convert it first, for one with iconv")


def _field(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"{where}: needs a JSON object with a field {field!r}, got a {type(record).__name__}")
    if field not in record:
        fields = ", ".join(sorted(map(str, record))[:10]) or "none"
        raise InputError(
            f"{where}: has no field {field!r}; its fields: {fields}; pass one of them as text_field (--text-field)"
        )
    if not isinstance(record[field], str):
        raise InputError(f"{where}: field {field!r} needs a string, got a {type(record[field]).__name__}")
    return _LONE_SURROGATE.sub("\ufffd", record[field])


def _cut(text: str, *, margin: int) -> list[str]:
    """Text cut at blank lines where there are some; the last piece is not finished.

    Where a cut falls depends on no more than `_MARGIN` characters, so the size of the blocks read does not matter.
    """
    pieces, start = [], 0
    while len(text) - start > max(margin, _MOST_CHARACTERS):
        ends = [text.find("\n\n", start + _LEAST_CHARACTERS, start + _MOST_CHARACTERS)]
        ends += [text.find(mark, start + _MOST_CHARACTERS, start + _MARGIN) for mark in ("\n", " ")]
        end = next((end for end in ends if end >= 0), start + _MARGIN)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _revision(data: str, name: str) -> str | None:
    """The dataset's present commit; raises `InputError` at once where the hub has none of that name, or no answer."""
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return dataset_info(name, timeout=TIMEOUT).sha
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(
            f"open_tokens(data={data!r}): the hub has no dataset {name!r} (or it is private); "
            "pass hf:owner/name[:config][:split]"
        ) from error
    except Exception as error:  # any transport's errors: no network, a proxy, an outage
        raise InputError(
            f"open_tokens(data={data!r}): the hub cannot be reached ({type(error).__name__}); "
            "try again, or pass a text or .jsonl file"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
