"""Reading safetensors files of dictionaries safely: every fault becomes one line. Knows no format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from replacement.errors import InputError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file in float32 (float64 kept); raises InputError where it is missing, damaged or
    not finite."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); it may be cut short") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: tensor {name!r} is {tensor.dtype}, needs floating point")
        tensors[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
        if not torch.isfinite(tensors[name]).all():
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
