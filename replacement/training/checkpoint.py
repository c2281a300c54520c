"""Training state on disk: one safetensors file that appears whole, by rename.

Holds tensors of layers and optimiser, the step, and the settings that produced them; refuses to go on under other
settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from replacement.errors import InputError
from replacement.training.config import EndToEndConfig, TrainingConfig


def write_checkpoint(
    path: Path,
    *,
    layers: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainingConfig | EndToEndConfig,
) -> None:
    """Store the state after `step` steps at `path`."""
    tensors = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    metadata = {"step": str(step), "config": _settings(config)}
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, part, metadata)
    os.replace(part, path)


def read_checkpoint(
    path: Path, *, layers: nn.ModuleList, optimizer: torch.optim.Optimizer, config: TrainingConfig | EndToEndConfig
) -> int:
    """Put the state of `path` into layers and optimiser; returns how many steps are done.

    Raises `InputError` for a file that is no checkpoint, or one of a run with other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"read_checkpoint({path}): not a whole safetensors file ({error}); delete it to start over"
        ) from error
    if metadata.get("config") != _settings(config):
        raise InputError(
            f"read_checkpoint({path}): made with other settings; delete it to start over, or train into another folder"
        )
    layers.load_state_dict(
        {name.removeprefix("layers."): t for name, t in tensors.items() if name.startswith("layers.")}
    )
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def _settings(config: TrainingConfig | EndToEndConfig) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)
