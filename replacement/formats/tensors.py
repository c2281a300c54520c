"""Safetensors files of dictionaries: read safely, every fault in one line; written piece by piece. Knows no format."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement.errors import InputError
from replacement.finite import all_finite

PIECE_BYTES = 2**23  #: of a tensor that is written piece by piece: those held at once, where a row is not more
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_tensors(path: Path, *, as_stored: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a safetensors file in float32 (float64 kept), those named in `as_stored` as they are.

    A tensor that is not converted is mapped from the file: it takes memory where it is read, and the system takes that
    back when it is short. Whoever replaces the file has to do it by rename, as `formats.save` does: bytes written into
    the file itself change tensors that are in use. Raises InputError where it is missing, damaged or not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); it may be cut short") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name!r} is {tensor.dtype}, needs floating point")
        if tensor.dtype.itemsize == 1 or (name not in as_stored and tensor.dtype != torch.float64):
            tensors[name] = tensor.float()  # numbers of 8 bits can't be picked or compared as they are
        if not all_finite(tensors[name]):
            raise InputError(f"{path}: tensor {name!r} has values that are not finite (NaN or inf)")
    return tensors


def require_known(tensors: Mapping[str, Tensor], known: Collection[str], path: Path) -> None:
    """Raise InputError for a tensor that is none of the known: left out in silence it would change the outputs."""
    if unknown := sorted(set(tensors) - set(known)):
        raise InputError(f"{path}: holds the tensor {unknown[0]!r}, which is not known here; known: {', '.join(known)}")


def take(tensors: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Tensor:
    """The named tensor; raises InputError where the file lacks it or it has another number of axes."""
    if name not in tensors:
        raise InputError(f"{path}: lacks the tensor {name}; it has {', '.join(map(repr, sorted(tensors))) or 'none'}")
    if tensors[name].ndim != ndim:
        raise InputError(f"{path}: tensor {name} has shape {list(tensors[name].shape)}, needs {ndim} axes")
    return tensors[name]


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file that whoever may read the folder can read: the library makes files for their owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


class Rows(NamedTuple):
    """A tensor that is to be written, and need not be anywhere as a whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Iterable[Shaped[Tensor, "rows ..."]]  #: in this dtype, one after another


def row_slices(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[slice]:
    """All rows of a tensor in their order, as many at a time as `PIECE_BYTES` hold, at least one."""
    each = max(1, PIECE_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
    return (slice(start, min(start + each, shape[0])) for start in range(0, shape[0], each))


def write_tensors(file: BinaryIO, tensors: Mapping[str, Rows]) -> None:
    """Write a safetensors file, the bytes that the library's `save` gives for the same tensors.

    `[length of the header, 8 bytes][header, JSON][tensors one after another]`: the header follows from shapes alone.
    """
    in_order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, end = {}, 0
    for name, rows in in_order:
        start, end = end, end + rows.dtype.itemsize * math.prod(rows.shape)
        header[name] = {"dtype": _NAMES[rows.dtype], "shape": rows.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for name, rows in in_order:
        for piece in rows.pieces:
            assert piece.dtype == rows.dtype
            written += file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert written == header[name]["data_offsets"][1], name
