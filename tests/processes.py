"""Several gloo processes on this machine that train a tiny table of runs, and what came of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.training import EndToEndConfig, TokenBatch, plans, train, train_end_to_end
from replacement.training.parallel import ALONE, Mesh, mesh_of
from replacement.training.report import Record
from tests.test_replacement_training import N_LAYERS, ToyModel, ToyModelSource, toy_config

FIGURES = ("loss", "fvu", "l0", "dead", "kl")


class Case(NamedTuple):
    """One run: changes to the toy settings, and whether an end-to-end stage follows."""

    name: str
    settings: Mapping[str, Any]
    end_to_end: bool = False
    stop_after: int | None = None


def run_case(case: Case, folder: Path, mesh: Mesh = ALONE) -> None:
    """Train one case in `folder/name`: figures of every step as JSON, and the dictionaries."""
    source = ToyModelSource(model := ToyModel())
    config, records = toy_config(**case.settings), list[Record]()
    out = folder / case.name
    trainee = train(
        source,
        plans(config, N_LAYERS),
        config=config,
        checkpoint=out / "checkpoint.safetensors",
        stop_after=case.stop_after,
        listeners=[records.append],
        show_progress=False,
        mesh=mesh,
    )
    if case.end_to_end:
        stage = EndToEndConfig(steps=8, documents=8, bridging_weight=0.5, input_noise=0.1)
        train_end_to_end(model, trainee, documents, config=stage, listeners=[records.append], show_progress=False)
    found = trainee.dictionaries()
    if mesh.is_first:
        formats.save(DictionarySet({one.layer: one for one in found}, case.name), out)
        figures = [{name: getattr(record, name) for name in FIGURES} for record in records]
        (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def documents(index: int) -> TokenBatch:
    drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(1000 + index))
    return TokenBatch(drawn, drawn > 6)


def spawn(cases: Sequence[Case], folder: Path, *, size: int, shards: int) -> None:
    """Run all cases in so many processes, the features of each dictionary spread over `shards` of them."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_process, (size, shards, list(cases), folder), nprocs=size)


def _process(rank: int, size: int, shards: int, cases: Sequence[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    mesh = mesh_of(shards)
    for case in cases:
        run_case(case, folder, mesh)
    dist.destroy_process_group()


def largest_difference(a: Path, b: Path, case: Case) -> dict[str, float]:
    """How far two runs of a case are apart, relative where figures are above 1: the largest over all steps."""
    one, other = (json.loads((folder / case.name / "figures.json").read_text()) for folder in (a, b))
    assert len(one) == len(other) > 0
    return {
        name: max(
            abs(x[name] - y[name]) / max(1.0, abs(x[name]))
            for x, y in zip(one, other, strict=True)
            if x[name] is not None
        )
        for name in FIGURES
        if any(x[name] is not None for x in one)
    }
