"""Training state on disk: one safetensors file that appears whole, by rename; of several processes a folder of them.

Holds tensors of dictionaries and optimiser, the step, the position in the data, and the settings that produced them;
refuses to go on under other settings. How many processes wrote it does not matter to those that read it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.formats.tensors import save_tensors
from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.folder import ADJUSTABLE, differences
from replacement.training.parallel import Mesh
from replacement.training.sharded_checkpoint import (
    Part,
    folder_of,
    newest,
    read_metadata,
    read_parts,
    remove_unfinished,
    write_parts,
)
from replacement.training.source import Position
from replacement.training.trainee import Trainee


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
    odd = next((name for name, tensor in tensors.items() if not all_finite(tensor)), "")
    if trainee.mesh.world.any(torch.tensor(bool(odd))):
        raise InputError(
            f"train: {odd.removeprefix('trainee.') or 'a tensor'} is not finite after step {step}; lower learning_rate "
            "and go on from the last checkpoint"
        )
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
        save_tensors(copies, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        shutil.rmtree(folder_of(path), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # where no file can be, there is none to remove
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
        if mesh.is_first:
            remove_unfinished(path)
        raise _unwritten(path, error) from error


def _unwritten(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"write_checkpoint({path}): cannot be written ({_reason(error)}); make room and run it again, from what is kept"
    )


def _reason(error: BaseException) -> str:
    """The first process's reason where several failed, without their traces."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(words.split())[:200]


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
    _require_settings(path, metadata.get("config"), config)
    if odd := next((name for name, tensor in tensors.items() if not all_finite(tensor)), None):
        raise InputError(f"read_checkpoint({path}): {odd} has values that are not finite; delete it to start over")
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
    _require_moments(path, tensors, trainee)
    trainee.load_state_dict(state)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor.reshape(()) if key == "step" else tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return _reached(path, metadata)


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


def _require_settings(path: Path, stored: str | None, config: TrainingConfig | EndToEndConfig) -> None:
    """Raise InputError unless the settings are those that a checkpoint was made with, but for adjustable ones."""
    words = ""
    try:
        differ = differences(json.loads(stored or ""), json.loads(config.to_json()))
        if not set(differ) - set(ADJUSTABLE):
            return
        words = f" ({', '.join([*differ.values()][:3])})"
    except (ValueError, AttributeError):
        pass
    raise InputError(
        f"read_checkpoint({path}): made with other settings{words}; delete it to start over, or train into another "
        "folder"
    )


def _require_moments(path: Path, tensors: dict[str, Tensor], trainee: Trainee) -> None:
    """Raise InputError unless the optimiser's tensors have their parameters' shapes: it would not look."""
    shapes = [parameter.shape for parameter in trainee.parameters()]
    for name, tensor in tensors.items():
        if not name.startswith("optimizer."):
            continue
        _, index, key = name.split(".")
        wanted = shapes[int(index)] if int(index) < len(shapes) else None
        if wanted is None or (tensor.numel() != 1 if key == "step" else tensor.shape != wanted):
            raise InputError(
                f"read_checkpoint({path}): {name} has shape {list(tensor.shape)}, this run needs "
                f"{'none' if wanted is None else list(wanted)}; it belongs to another model or data"
            )


def _reached(path: Path, metadata: dict[str, str]) -> tuple[int, Position]:
    try:
        block, place = json.loads(metadata["position"])
        step, position = int(metadata["step"]), Position(int(block), int(place))
        if min(step, *position) < 0:
            raise ValueError(f"step {step}, {position}")
        return step, position
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"read_checkpoint({path}): does not say which step it is of ({error}); delete it to start over"
        ) from error
