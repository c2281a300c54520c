"""Several gloo processes on this machine that train a tiny table of runs, and what came of each.

`python -m tests.processes` prints how far each way of sharing a run is from one process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from replacement.loading import load_bridge
from replacement.training import ActivationSource, EndToEndConfig, TokenBatch, plans, train, train_end_to_end
from replacement.training.data import BridgeActivations, JointActivations, fill_cache, open_cache
from replacement.training.export import export
from replacement.training.kinds import sites
from replacement.training.parallel import ALONE, Mesh, mesh_of
from replacement.training.report import Record
from tests.test_replacement_training import N_LAYERS, ToyModel, ToyModelSource, toy_config
from tests.tiny import save_tiny_model

FIGURES = ("loss", "fvu", "l0", "dead", "kl")
WAYS = ((2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # processes, and over how many of them features are spread


class Case(NamedTuple):
    """One run: changes to the toy settings, and whether an end-to-end stage follows."""

    name: str
    settings: Mapping[str, Any]
    end_to_end: bool = False
    stop_after: int | None = None
    models: tuple[str, ...] = ()
    """Names of tiny models that are read side by side; () for the toy."""
    cache_dtype: str = ""
    """How activations are kept in a cache that the run is trained from; "" for none."""


def _case(
    name: str, *, end_to_end: bool = False, models: tuple[str, ...] = (), cache_dtype: str = "", **settings: Any
) -> Case:
    short = {"tokens": 64 * 12, "dead_after": 128, "start": "random"}
    return Case(name, {**short, **settings}, end_to_end, models=models, cache_dtype=cache_dtype)


FEW = (
    _case("clt batchtopk prefixes auxk", kind="clt", prefixes=(24,)),
    _case("skip topk", kind="skip_transcoder", sparsity="topk"),
    _case("skip gated end to end", kind="skip_transcoder", sparsity="gated", end_to_end=True),
    _case("cached", cache_dtype="int8_token"),
    _case("two models", kind="crosscoder", site="hook_resid_post", models=("base", "tuned")),
)
"""A twin of `CASES` that takes seconds."""
CASES = (
    *FEW,
    _case("relu", sparsity="relu", kind="clt"),
    _case("jumprelu", sparsity="jumprelu", prefixes=(24, 40)),
    _case("jumprelu quadratic", sparsity="jumprelu", penalty="quadratic"),
    _case("resample", dead="resample"),
    _case("ghost", dead="ghost"),
    _case("preactivation", dead="preactivation"),
    _case("samples floor crosscoder", kind="crosscoder", site="mlp.hook_in", start="samples", floor=0.2),
    _case("clusters causal crosscoder", kind="causal_crosscoder", site="mlp.hook_out", start="clusters"),
    _case("clt end to end", kind="clt", end_to_end=True),
    _case("crosscoder end to end", kind="crosscoder", site="mlp.hook_out", end_to_end=True),
)
"""Every sparsity, remedy, start and way of writing."""
WHOLE = (
    _case("switch topk", encoder="switch", experts=4, sparsity="topk", balance_weight=1.0, end_to_end=True),
    _case("kronecker batchtopk clt", encoder="kronecker", kind="clt"),
)
"""Encoders whose features stay in one process; tokens are shared."""


def cases_of(shards: int, cases: Sequence[Case] = CASES) -> tuple[Case, ...]:
    """The cases that can spread features over so many processes."""
    return tuple(cases) if shards > 1 else (*cases, *WHOLE)


def run_case(case: Case, folder: Path, mesh: Mesh = ALONE, device: torch.device | str = "cpu") -> None:
    """Train one case in `folder/name`: figures of every step as JSON, and the dictionaries."""
    model = ToyModel(device)
    config, records = toy_config(**case.settings), list[Record]()
    out = folder / case.name
    out.mkdir(parents=True, exist_ok=True)
    trainee = train(
        source_of(case, model, out, mesh),
        plans(config, N_LAYERS, models=case.models),
        config=config,
        checkpoint=out / "checkpoint.safetensors",
        stop_after=case.stop_after,
        listeners=[records.append],
        show_progress=False,
        mesh=mesh,
        device=device,
    )
    if case.end_to_end:
        stage = EndToEndConfig(steps=8, documents=8, bridging_weight=0.5, input_noise=0.1)
        train_end_to_end(model, trainee, documents, config=stage, listeners=[records.append], show_progress=False)
    export(trainee, out, metadata={})
    if mesh.is_first:
        write_figures(records, out)


def write_figures(records: Sequence[Record], out: Path) -> None:
    """Leave what `largest_difference` reads."""
    figures = [{name: getattr(record, name) for name in FIGURES} for record in records]
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def source_of(case: Case, model: ToyModel, out: Path, mesh: Mesh) -> ActivationSource:
    """Where a case's activations come from; what has to lie on disk for that is put into `out`."""
    config = toy_config(**case.settings)
    if case.models:
        wanted = [site.partition(":")[2] for site in sites(plans(config, N_LAYERS, models=case.models[:1]))]
        bridges = zip(case.models, tiny_bridges(len(case.models), out / "model", mesh), strict=True)
        return JointActivations(
            {name: BridgeActivations(bridge, Drawn(), sites=wanted, documents=8) for name, bridge in bridges}
        )
    source, cache = ToyModelSource(model), out / "activations"
    if not case.cache_dtype:
        return source
    held = open_cache(source, cache, dtype=case.cache_dtype, model="toy", fingerprint="toy")
    return fill_cache(source, cache, held=held, config=config, show_progress=False, mesh=mesh)


def tiny_bridges(count: int, folder: Path, mesh: Mesh) -> list[Any]:
    """A tiny model, and others that differ from it a little; the first process writes the model's folder."""
    if mesh.is_first:
        save_tiny_model("llama", folder)
    mesh.wait()
    bridges = [load_bridge(folder, torch.float32, "cpu")[0] for _ in range(count)]
    for bridge in bridges[1:]:
        generator = torch.Generator().manual_seed(0)
        for parameter in bridge.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return bridges


class Drawn:
    """Rows of random tokens, start tokens among them."""

    context, n_documents, fingerprint = 16, None, "drawn"

    def batch(self, index: int, documents: int) -> Tensor:
        return torch.randint(20, (documents, self.context), generator=torch.Generator().manual_seed(index))


def documents(index: int) -> TokenBatch:
    drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(1000 + index))
    return TokenBatch(drawn, drawn > 6)


class Job(NamedTuple):
    """A case, its folder, over how many processes the features of each dictionary are spread, and what is done."""

    case: Case
    folder: Path
    shards: int
    do: Callable[[Case, Path, Mesh], None] = run_case


def spawn(jobs: Sequence[Job], *, size: int) -> None:
    """Do all jobs, one after another, in so many processes."""
    with tempfile.TemporaryDirectory() as meeting:
        mp.spawn(_process, (size, list(jobs), meeting), nprocs=size)


def _process(rank: int, size: int, jobs: Sequence[Job], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=size)
    meshes = {shards: mesh_of(shards) for shards in sorted({job.shards for job in jobs})}
    for job in jobs:
        job.do(job.case, job.folder, meshes[job.shards])
    dist.destroy_process_group()


def largest_difference(a: Path, b: Path, name: str) -> dict[str, float]:
    """How far two runs of a case are apart, relative where figures are above 1: the largest over all steps."""
    one, other = (json.loads((folder / name / "figures.json").read_text()) for folder in (a, b))
    assert len(one) == len(other) > 0
    pairs = list(zip(one, other, strict=True))
    return {
        figure: max(abs(x[figure] - y[figure]) / max(1.0, abs(x[figure])) for x, y in pairs if x[figure] is not None)
        for figure in FIGURES
        if any(x[figure] is not None for x, _ in pairs)
    }


def main() -> None:
    """Print, for each way of sharing, the largest difference of any figure of any step from one process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        one = Path(place) / "one"
        for case in cases_of(1):
            run_case(case, one)
        print(
            f"{'processes':>9} {'data':>5} {'features':>8} {'loss':>9} {'fvu':>9} {'l0':>9} {'dead':>9}  worst in loss"
        )
        for size in sorted({size for size, _ in WAYS}):
            ways = [shards for processes, shards in WAYS if processes == size]
            spawn([Job(case, Path(place) / f"{size}-{n}", n) for n in ways for case in cases_of(n)], size=size)
        for size, shards in WAYS:
            folder = Path(place) / f"{size}-{shards}"
            found = {case.name: largest_difference(one, folder, case.name) for case in cases_of(shards)}
            most = {name: max(each[name] for each in found.values()) for name in FIGURES[:4]}
            worst = max(found, key=lambda name: found[name]["loss"])
            print(f"{size:9} {size // shards:5} {shards:8}", *(f"{most[name]:9.1e}" for name in most), f" {worst}")


if __name__ == "__main__":
    main()
