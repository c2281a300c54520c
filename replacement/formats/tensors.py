"""Reading safetensors files of dictionaries safely: every fault becomes one line. Knows no format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from replacement.errors import InputError

CHECKED_AT_ONCE = 2**24  #: numbers of a large tensor that are looked at together


def read_tensors(path: Path, *, as_stored: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a safetensors file in float32 (float64 kept), those named in `as_stored` as they are.

    A tensor that is not converted is mapped from the file: it takes memory where it is read, and the system takes that
    back when it is short. Raises InputError where the file is missing, damaged or not finite.
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
        if not all(torch.isfinite(part).all() for part in tensors[name].flatten().split(CHECKED_AT_ONCE)):
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
