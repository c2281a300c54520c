"""Reading safetensors files of dictionaries safely: every fault becomes one line. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
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
            raise InputError(f"{path}: tensor {name} is {tensor.dtype}, needs floating point")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: tensor {name} has values that are not finite (NaN or inf)")
    return {name: tensor if tensor.dtype == torch.float64 else tensor.float() for name, tensor in tensors.items()}


def take(tensors: Mapping[str, Tensor], name: str, ndim: int, path: Path) -> Tensor:
    """The named tensor; raises InputError where the file lacks it or it has another number of axes."""
    if name not in tensors:
        raise InputError(f"{path}: lacks the tensor {name}; it has {', '.join(sorted(tensors)) or 'none'}")
    if tensors[name].ndim != ndim:
        raise InputError(f"{path}: tensor {name} has shape {list(tensors[name].shape)}, needs {ndim} axes")
    return tensors[name]
