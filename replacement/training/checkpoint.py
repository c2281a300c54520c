"""Training state on disk: one safetensors file that appears whole, by rename.

Holds tensors of dictionaries and optimiser, the step, the position in the data, and the settings that produced them;
refuses to go on under other settings.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from replacement.errors import InputError
from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.source import Position


def write_checkpoint(
    path: Path,
    *,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainingConfig | EndToEndConfig,
    position: Position | None = None,
) -> None:
    """Store the state after `step` steps at `path`; raises `InputError` where the disk does not take it.

    What was there before stays until the new file is whole.
    """
    tensors = {f"trainee.{name}": tensor for name, tensor in trainee.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    metadata = {"step": str(step), "config": config.to_json(), "position": json.dumps(position or Position())}
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"write_checkpoint({path}): cannot be written ({error}); make room and go on from the last checkpoint"
        ) from error


def read_checkpoint(
    path: Path,
    *,
    trainee: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig | EndToEndConfig,
) -> tuple[int, Position]:
    """Put the state of `path` into dictionaries and optimiser; returns the steps done and the position in the data.

    Raises `InputError` for a damaged file, other settings, or tensors of other shapes.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"read_checkpoint({path}): not a whole safetensors file ({error}); delete it to start over"
        ) from error
    if metadata.get("config") != config.to_json():
        raise InputError(
            f"read_checkpoint({path}): made with other settings{_difference(metadata.get('config'), config)}; "
            "delete it to start over, or train into another folder"
        )
    state = {name.removeprefix("trainee."): t for name, t in tensors.items() if name.startswith("trainee.")}
    own = trainee.state_dict()
    if odd := next(
        (n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape), None
    ):
        raise InputError(
            f"read_checkpoint({path}): {odd} has shape {list(state[odd].shape) if odd in state else 'none'}, this run "
            f"needs {list(own[odd].shape) if odd in own else 'none'}; it belongs to another model or data"
        )
    trainee.load_state_dict(state)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), Position(*json.loads(metadata["position"]))


def _difference(stored: str | None, config: TrainingConfig | EndToEndConfig) -> str:
    try:
        old, new = json.loads(stored or ""), json.loads(config.to_json())
    except ValueError:
        return ""
    differ = [f"{name} {old.get(name)} there, {new.get(name)} here" for name in new if old.get(name) != new[name]]
    return f" ({', '.join(differ[:3])})" if differ else ""
