"""Training state that several processes write and read together: `torch.distributed.checkpoint` on safetensors files.

A folder holds one folder a step, which appears whole, by rename, and one process's file may stand beside it. Each
tensor with a row for each feature is stored in the parts that processes held; any other number of processes, one
included, reads back the rows that it needs. Nothing is pickled. Knows names and rows, and nothing of what they mean.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard

from replacement.training.parallel import Mesh

_STATE = "state.json"


class Part(NamedTuple):
    """A tensor, or this process's rows of one."""

    rows: Shaped[Tensor, "rows ..."]
    is_spread: bool  #: whether the processes of a row of the mesh have other rows


def folder_of(path: Path) -> Path:
    """Where the checkpoints of several processes stand beside the file of one."""
    return path.with_suffix("")


def newest(path: Path) -> Path | None:
    """The last whole step in the folder beside a checkpoint's file, None where there is none."""
    found = [step for step in folder_of(path).glob("step-*") if (step / _STATE).is_file() and not step.suffix]
    return max(found, default=None)


def has_checkpoint(path: Path) -> bool:
    """Whether there is something to go on from, of one process or of several."""
    return path.exists() or newest(path) is not None


def remove_unfinished(path: Path) -> None:
    """Remove steps that are not whole from the folder beside a checkpoint's file."""
    for draft in folder_of(path).glob("*.part"):
        shutil.rmtree(draft, ignore_errors=True)


def write_parts(path: Path, parts: Mapping[str, Part], *, metadata: Mapping[str, str], step: int, mesh: Mesh) -> None:
    """Store all parts of a step; all processes call this. Raises OSError or `dcp.api.CheckpointException`."""
    whole = folder_of(path) / f"step-{step:09d}"
    draft = whole.with_suffix(".part")
    if mesh.is_first:
        remove_unfinished(path)  # what a killed run left
        draft.mkdir(parents=True)
        (draft / _STATE).write_text(json.dumps(dict(metadata)), encoding="utf-8")
    mesh.wait()
    state = {name: _placed(part.rows.detach().cpu(), part.is_spread, mesh) for name, part in parts.items()}
    writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
    dcp.save(state, storage_writer=writer, process_group=mesh.world.group)
    if mesh.is_first:
        os.replace(draft, whole)
        for old in folder_of(path).glob("step-*"):
            if old != whole:
                shutil.rmtree(old)
    mesh.wait()


def read_metadata(step: Path) -> dict[str, str]:
    """What was stored beside the tensors; raises ValueError where it is damaged."""
    return json.loads((step / _STATE).read_text(encoding="utf-8"))


def read_parts(step: Path, is_spread: Callable[[str, int], bool], mesh: Mesh) -> dict[str, Tensor]:
    """All tensors, of spread ones (by name and number of axes) the rows of this process; all processes call this.

    Tensors without axes come back with one.
    """
    stored = HuggingFaceStorageReader(str(step)).read_metadata().state_dict_metadata
    state: dict[str, Tensor] = {}
    for name, entry in stored.items():
        assert isinstance(entry, dcp.TensorStorageMetadata)
        shape = list(entry.size)
        spread = is_spread(name, len(shape))
        if spread:
            shape[0] //= mesh.features.size
        state[name] = _placed(torch.empty(shape, dtype=entry.properties.dtype), spread, mesh)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(
            state,
            storage_reader=HuggingFaceStorageReader(str(step)),
            process_group=mesh.world.group,
            no_dist=mesh.world.size == 1,
        )
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}


def _placed(rows: Tensor, is_spread: bool, mesh: Mesh) -> Tensor:
    """A tensor that says which rows of the whole it has; without axes it gets one."""
    rows = rows.reshape(1) if rows.ndim == 0 else rows.contiguous()
    if mesh.devices is None or not is_spread:
        return rows
    return DTensor.from_local(rows, mesh.devices, [Replicate(), Shard(0)], run_check=False)
