"""A whole training run in a folder: data, both stages, checkpoints, log, and the finished dictionaries.

| file | is |
| --- | --- |
| `training.json` | the settings of the run |
| `log.jsonl` | figures of every tenth step |
| `checkpoints/` | what a stopped run goes on from |
| `config.json`, `layer_*.safetensors` | the dictionaries, when the run is done |

Several processes, started by `torchrun`, train one run together; the first of them writes all but the checkpoints.
Knows the order of things; every step is another file's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.training import folder
from replacement.training.bridge import ReplaceableBridge
from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.data import (
    BridgeActivations,
    CachedActivations,
    JointActivations,
    TokenSource,
    fill_cache,
    open_cache,
    open_tokens,
)
from replacement.training.data.cache import CacheIndex
from replacement.training.end_to_end import require_fitting, train_end_to_end
from replacement.training.export import export
from replacement.training.kinds import Plan, plans, site_of, sites
from replacement.training.pairs import require_comparable
from replacement.training.parallel import ALONE, Mesh
from replacement.training.reconstruction import train
from replacement.training.report import JSONLog, Listener, Record, dashboard, dashboard_module
from replacement.training.source import ActivationSource
from replacement.training.trainee import require_spreading


class Finished(NamedTuple):
    """What a run leaves behind."""

    folder: Path
    written: tuple[str, ...]  #: sites that the dictionaries write, each once
    reconstruction: Record | None  #: the last step of the stage, None where it was done before; in the first process
    end_to_end: Record | None
    cache: CacheIndex | None  #: what the cache holds, and what its precision lost; None where the model was run

    @property
    def dictionaries(self) -> DictionarySet:
        """What was trained, read back from the folder; it may be more than this machine has memory for."""
        return formats.load(self.folder)


class _Last:
    """Keeps the last record of each stage."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}

    def __call__(self, record: Record) -> None:
        self.records[record.stage] = record


def run(
    bridge: Any,
    *,
    model: str,
    data: str,
    config: TrainingConfig,
    out: Path,
    end_to_end: EndToEndConfig | None = None,
    context: int = 128,
    documents: int = 32,
    text_field: str = "text",
    cache: Path | None = None,
    cache_dtype: str = "bfloat16",
    dashboards: Sequence[str] = (),
    checkpoint_every: int = 200,
    show_progress: bool = True,
    mesh: Mesh = ALONE,
) -> Finished:
    """Train what `config` asks for on a bridge's activations, in the folder `out`; a stopped run goes on from there.

    bridge: a model, on whose device dictionaries train, or several by name whose sites one crosscoder reads side by
    side. model, data: as they were named, kept in `training.json`; data as of `open_tokens`. end_to_end: a last stage
    that brings the replaced model's predictions to the original's. context: tokens of a row, at most the models'.
    documents: rows of one forward pass. cache: folder of activations to train from; what it lacks is written there
    first, by running the model. cache_dtype: how they are kept there, of `storage.DTYPES`; without a cache, too, they
    are bfloat16. dashboards: of `report.DASHBOARDS`. mesh: processes that train together, all of which call this; as in
    `train`. A run may go on with another number.
    Raises `InputError` for settings that contradict each other, models that cannot be compared, a folder or a cache of
    another run, or bad data.
    """
    bridges = _bridges(bridge, end_to_end)
    bridge = next(iter(bridges.values()))
    planned = plans(config, min(len(one.blocks) for one in bridges.values()), models=tuple(filter(None, bridges)))
    _require(config, end_to_end, planned, dashboards, checkpoint_every, mesh)
    context = min([context, *(int(one.cfg.n_ctx) for one in bridges.values())])
    tokens = open_tokens(data, model=bridge, context=context, text_field=text_field, seed=config.seed)
    live = _source(bridges, tokens, sites(planned), documents, is_cached=cache is not None)
    rest = {"model": model, "data": data, "text_field": text_field, "context": context, "documents": documents}
    settings = _settings(config, end_to_end, bridge, **rest, activations=cache_dtype, source=live.origin)
    folder.to_write(out, settings)
    fill = _opened(live, cache, cache_dtype, model, out)
    mesh.wait()  # all have looked at the folder
    with folder.held(out, by_this=mesh.is_first):  # everything could be opened: from here on the folder is this run's
        if mesh.is_first and (new := folder.to_write(out, settings)) is not None:
            folder.write_settings(out, new)
        listeners: list[Listener] = [JSONLog(out / "log.jsonl"), last := _Last()]
        listeners += [dashboard(name, out, settings) for name in (dashboards if mesh.is_first else ())]
        watched: Any = {"checkpoint_every": checkpoint_every, "listeners": listeners, "show_progress": show_progress}
        checkpoint = folder.checkpoint_of(out, "reconstruction")
        source = fill(config=config, show_progress=show_progress, mesh=mesh)
        where: Any = {"mesh": mesh, "device": next(bridge.parameters()).device}
        trainee = train(source, planned, config=config, checkpoint=checkpoint, **where, **watched)
        if end_to_end is not None:
            replaceable, checkpoint = ReplaceableBridge(bridge, sites(planned)), folder.checkpoint_of(out, "end_to_end")
            batches = replaceable.batches(tokens, end_to_end.documents)
            train_end_to_end(replaceable, trainee, batches, config=end_to_end, checkpoint=checkpoint, **watched)
        export(trainee, out, metadata=folder.read_settings(out))
    index = source.index if isinstance(source, CachedActivations) else None
    written = tuple(dict.fromkeys(site_of(name) for name in trainee.written))
    return Finished(out, written, last.records.get("reconstruction"), last.records.get("end to end"), index)


def _require(
    config: TrainingConfig,
    last: EndToEndConfig | None,
    planned: Sequence[Plan],
    dashboards: Sequence[str],
    every: int,
    mesh: Mesh,
) -> None:
    """Raise `InputError` for what would be refused later, when there is work to lose."""
    processes = mesh.data.size
    if every < 1:
        raise InputError(f"run(checkpoint_every={every}): needs at least 1")
    if config.batch_tokens % processes:
        raise InputError(
            f"run(batch_tokens={config.batch_tokens}): {processes} processes share a batch; pass a multiple"
        )
    require_spreading(config, mesh)
    for name in dashboards:
        dashboard_module(name)
    if last is not None:
        require_fitting(last, config, [plan.layer for plan in planned], processes)


def _bridges(bridge: Any, end_to_end: EndToEndConfig | None) -> dict[str, Any]:
    """The models by name; one alone has the name ""."""
    if not isinstance(bridge, Mapping):
        return {"": bridge}
    if end_to_end is not None:
        raise InputError("run(end_to_end=...): replaces one model's sites; leave it out with several models")
    require_comparable(bridge)
    return dict(bridge)


def _source(
    bridges: Mapping[str, Any], tokens: TokenSource, planned: Sequence[str], documents: int, *, is_cached: bool
) -> BridgeActivations | JointActivations:
    """The models' activations; in an order that does not depend on the kind, so that kinds can share a cache."""
    # a cache rounds by itself, and measures what that costs
    harvest: dict[str, Any] = {"documents": documents, "dtype": torch.float32 if is_cached else torch.bfloat16}
    wanted = sorted(planned)
    if "" in bridges:
        return BridgeActivations(bridges[""], tokens, sites=wanted, **harvest)
    of = {name: [site.removeprefix(f"{name}:") for site in wanted if site.startswith(f"{name}:")] for name in bridges}
    parts = {name: BridgeActivations(one, tokens, sites=of[name], **harvest) for name, one in bridges.items()}
    return JointActivations(parts)


def _opened(
    source: BridgeActivations | JointActivations, cache: Path | None, dtype: str, model: str, out: Path
) -> Callable[..., ActivationSource]:
    """What gives a run its activations once it begins; raises `InputError` where a cache holds something else, or lies
    in the run's folder, which would be a stranger's once the cache is made.
    """
    if cache is not None:
        if out.resolve() in (cache.resolve(), *cache.resolve().parents):
            raise InputError(f"run(cache={str(cache)!r}): lies in the run's own folder {out}; pass a folder beside it")
        held = open_cache(source, cache, dtype=dtype, model=model, fingerprint=source.fingerprint)
        return partial(fill_cache, source, cache, held=held)
    if dtype != "bfloat16":
        raise InputError(f"run(cache_dtype={dtype!r}): is how a cache keeps activations; pass cache, or leave it out")
    return lambda **_: source


def _settings(config: TrainingConfig, end_to_end: EndToEndConfig | None, bridge: Any, **rest: object) -> dict[str, Any]:
    """What `training.json` holds."""
    last = None if end_to_end is None else dataclasses.asdict(end_to_end)
    dtype = str(next(bridge.parameters()).dtype).removeprefix("torch.")
    return {**rest, "dtype": dtype, "reconstruction": dataclasses.asdict(config), "end_to_end": last}
