"""Training state on disk: one safetensors file that appears whole, by rename; of several processes a folder of them.

Holds tensors of dictionaries and optimiser, the step, the position in the data, and the settings that produced them;
refuses to go on under other settings. How many processes wrote it does not matter to those that read it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from replacement.errors import InputError
from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.parallel import Mesh
from replacement.training.sharded_checkpoint import Part, folder_of, newest, read_metadata, read_parts, write_parts
from replacement.training.source import Position
from replacement.training.trainee import Trainee


def has_checkpoint(path: Path) -> bool:
    """Whether there is something to go on from, of one process or of several."""
    return path.exists() or newest(path) is not None


def write_checkpoint(
    path: Path,
    *,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainingConfig | EndToEndConfig,
    position: Position | None = None,
) -> None:
    """Store the state after `step` steps at `path`; raises `InputError` where the disk does not take it.

    What was there before stays until the new file is whole. Of several processes all call this, and write to the folder
    of the file's name without its ending.
    """
    tensors = {f"trainee.{name}": tensor for name, tensor in trainee.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    metadata = {"step": str(step), "config": config.to_json(), "position": json.dumps(position or Position())}
    if trainee.mesh.world.size > 1:
        _write_together(path, tensors, metadata, step=step, is_spread=_spread(trainee), mesh=trainee.mesh)
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(copies, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        shutil.rmtree(folder_of(path), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise _unwritten(path, error) from error


def _write_together(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    *,
    step: int,
    is_spread: Callable[[str, int], bool],
    mesh: Mesh,
) -> None:
    parts = {name: Part(tensor, is_spread(name, tensor.ndim)) for name, tensor in tensors.items()}
    try:
        write_parts(path, parts, metadata=metadata, step=step, mesh=mesh)
        if mesh.is_first:
            path.unlink(missing_ok=True)
    except (OSError, CheckpointException) as error:
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"write_checkpoint({path}): cannot be written ({error}); make room and go on from the last checkpoint"
    )


def _spread(trainee: Trainee) -> Callable[[str, int], bool]:
    """Whether a checkpoint's tensor, of some name and number of axes, has a row for each feature."""
    axes_of = {name: tensor.ndim for name, tensor in trainee.state_dict().items()}
    parameters = [name for name, _ in trainee.named_parameters()]

    def is_spread(name: str, axes: int) -> bool:
        kind, _, rest = name.partition(".")
        if kind == "trainee":
            return trainee.is_spread(rest, axes_of.get(rest, 0))
        index, _, key = rest.partition(".")
        return key != "step" and trainee.is_spread(parameters[int(index)], axes)

    return is_spread


def read_checkpoint(
    path: Path,
    *,
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig | EndToEndConfig,
) -> tuple[int, Position]:
    """Put the state of `path` into dictionaries and optimiser; returns the steps done and the position in the data.

    Where both one process's file and several processes' folder are left, the one with more steps counts. Raises
    `InputError` for a damaged file, other settings, or tensors of other shapes.
    """
    metadata, tensors = _read(path, _spread(trainee), trainee.mesh)
    if metadata.get("config") != config.to_json():
        raise InputError(
            f"read_checkpoint({path}): made with other settings{_difference(metadata.get('config'), config)}; "
            "delete it to start over, or train into another folder"
        )
    own = trainee.state_dict()
    state = {name.removeprefix("trainee."): t for name, t in tensors.items() if name.startswith("trainee.")}
    state = {n: t.reshape(()) if n in own and not own[n].ndim and t.numel() == 1 else t for n, t in state.items()}
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
            moments.setdefault(int(index), {})[key] = tensor.reshape(()) if key == "step" else tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), Position(*json.loads(metadata["position"]))


def _read(path: Path, is_spread: Callable[[str, int], bool], mesh: Mesh) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of the checkpoint with the most steps, of spread tensors the rows of this process."""
    folder = newest(path)
    where: Any = path
    try:
        together = {} if folder is None else read_metadata(folder)
        if path.exists():
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if not together or int(metadata["step"]) >= int(together["step"]):
                    return metadata, {name: _rows(file, name, is_spread, mesh) for name in file.keys()}  # noqa: SIM118
        assert folder is not None
        where = folder
        return together, read_parts(folder, is_spread, mesh)
    except (SafetensorError, OSError, ValueError, KeyError, CheckpointException) as error:
        raise InputError(
            f"read_checkpoint({where}): not a whole safetensors file ({error}); delete it to start over"
        ) from error


def _rows(file: Any, name: str, is_spread: Callable[[str, int], bool], mesh: Mesh) -> Tensor:
    if mesh.features.size == 1:
        return file.get_tensor(name)
    piece = file.get_slice(name)
    shape = piece.get_shape()
    if not is_spread(name, len(shape)) or shape[0] % mesh.features.size:
        return file.get_tensor(name)
    return piece[mesh.features.rows_of(shape[0])]


def _difference(stored: str | None, config: TrainingConfig | EndToEndConfig) -> str:
    try:
        old, new = json.loads(stored or ""), json.loads(config.to_json())
    except ValueError:
        return ""
    differ = [f"{name} {old.get(name)} there, {new.get(name)} here" for name in new if old.get(name) != new[name]]
    return f" ({', '.join(differ[:3])})" if differ else ""
