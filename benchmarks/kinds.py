"""What a short training run reaches on atlas: every kind of dictionary with every sparsity, from random directions and
from shared clusters, and the trainer's options.

    python benchmarks/kinds.py [--kind KIND ...] [--sparsity SPARSITY ...] [--only WORDS ...] [--json FILE]

Every row trains dictionaries of two layers on the same tokens, with one thread and the trainer's defaults for all
that the row does not name, and is measured on tokens that no row trained on. `start`: FVU before the first step. `FVU`:
mean over the written sites; `worst`: the worst of them. `L0`: mean over dictionaries; `off`: how far the farthest of
them is from the wanted k. `dead`: features that fire at no held-out token. `CPU s`: of training alone. Last, what needs
no training: the best affine map of rank k, and a random encoder with the best decoder, of as many features and the
same k. The model runs once for all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from replacement.dictionary import DictionarySet  # noqa: E402
from replacement.evaluation.baselines import principal_components, random_dictionary  # noqa: E402
from replacement.evaluation.reconstruction import ErrorMeter, FiringMeter  # noqa: E402
from replacement.evaluation.splicing import encode, reconstruct  # noqa: E402
from replacement.formats.drafts import write_whole  # noqa: E402
from replacement.loading import load_bridge  # noqa: E402
from replacement.training import Trainee, TrainingConfig, plans, train  # noqa: E402
from replacement.training.config import KINDS, SPARSITIES  # noqa: E402
from replacement.training.data import (  # noqa: E402
    BridgeActivations,
    CachedActivations,
    open_tokens,
    write_activations,
)
from replacement.training.kinds import sites  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "kinds.json"
SETTINGS: dict[str, Any] = {
    "layers": (2, 3),
    "n_features": 512,
    "k": 16,
    "batch_tokens": 512,
    "tokens": 300 * 512,
    "buffer_bytes": 32_000_000,
}
DOCUMENTS, BATCHES, HELD_OUT = 64, 45, 4  # rows of one forward pass; such batches of all that a row reads; held out
FIT_BATCHES = 2  # that the baselines are fitted on
TABLE = {f"{kind} {sparsity}": {"kind": kind, "sparsity": sparsity} for kind in KINDS for sparsity in SPARSITIES}
FROM_CLUSTERS = {f"{name}, shared clusters": {**row, "start": "shared_clusters"} for name, row in TABLE.items()}
OPTIONS: dict[str, dict[str, Any]] = {
    "prefixes 64, 192": {"prefixes": (64, 192)},
    "switch, 8 experts": {"encoder": "switch"},
    "kronecker, 2 x 4": {"encoder": "kronecker"},
    "floor 0.2": {"floor": 0.2},
    "start samples": {"start": "samples"},
    "start clusters": {"start": "clusters"},
    "dead resample": {"dead": "resample"},
    "dead ghost": {"dead": "ghost"},
    "dead preactivation": {"dead": "preactivation"},
    "dead none": {"dead": "none"},
    "jumprelu quadratic": {"sparsity": "jumprelu", "penalty": "quadratic"},
}
"""Of transcoders with BatchTopK, unless they say otherwise."""


class Figures(NamedTuple):
    """One row, on held-out tokens."""

    start: float  #: mean FVU of the written sites before the first step
    fvu: float  #: mean over written sites
    worst: float  #: the highest FVU of a written site
    l0: float  #: mean over dictionaries
    off: float  #: largest |L0 / k - 1| of a dictionary
    dead: float  #: share of features that fire at no held-out token
    seconds: float  #: CPU time of training


class Baselines(NamedTuple):
    """Mean FVU over the same sites of what needs no training."""

    components: float  #: best affine map of rank k
    random: float  #: random encoder with the best decoder


class Data(NamedTuple):
    """Activations at all sites that any kind reads or writes."""

    folder: Path  #: of the training tokens'
    held_out: dict[str, Tensor]  #: float32
    n_layers: int

    def source(self, names: tuple[str, ...]) -> CachedActivations:
        """The training tokens' activations at some sites."""
        return CachedActivations(self.folder, dtype=torch.bfloat16, sites=names)


def open_data(folder: Path, *, layers: tuple[int, ...], batches: int, held_out: int = HELD_OUT) -> Data:
    """Activations for all kinds, read from `folder` where they are there; the model runs where they are not."""
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    n_layers = len(bridge.blocks)
    every = [plans(TrainingConfig(kind=kind, layers=layers), n_layers) for kind in KINDS]
    wanted = sorted({name for planned in every for name in sites(planned)})
    parts = []
    for split in ("train", "held_out"):
        tokens = open_tokens("atlas", model=bridge, context=64, split=split)
        parts.append(BridgeActivations(bridge, tokens, sites=wanted, documents=DOCUMENTS))
    live, unseen = parts
    write_activations(live, folder, batches=batches, model="atlas", fingerprint=live.fingerprint, dtype="bfloat16")
    rest = [unseen.batch(index) for index in range(held_out)]
    return Data(folder, {name: torch.cat([batch[name] for batch in rest]) for name in wanted}, n_layers)


def measured(config: TrainingConfig, data: Data) -> Figures:
    """Train one row and measure it."""
    planned = plans(config, data.n_layers)
    source = data.source(sites(planned))
    before = train(source, planned, config=config, stop_after=0, show_progress=False)
    start, _, _ = _errors_and_firing(before, data.held_out)
    clock = time.process_time()
    trainee = train(source, planned, config=config, show_progress=False)
    seconds = time.process_time() - clock
    fvu, l0, dead = _errors_and_firing(trainee, data.held_out)
    off = max(abs(one / config.k_of(index, len(l0)) - 1) for index, one in enumerate(l0))
    return Figures(_mean(start), _mean(fvu), max(fvu), _mean(l0), off, _mean(dead), seconds)


@torch.no_grad()
def _errors_and_firing(trainee: Trainee, held_out: Mapping[str, Tensor]) -> tuple[list[float], ...]:
    """FVU of each written site; L0 and share of dead features of each dictionary."""
    found = DictionarySet({one.layer: one for one in trainee.dictionaries()}, "trained")
    errors = {name: ErrorMeter() for name in trainee.written}
    firing = {one.layer: FiringMeter(one.n_features) for one in found}
    for batch in _pieces(held_out):
        encodings = encode(found, batch)
        for layer, meter in firing.items():
            meter.update(encodings[layer])
        for name, error in errors.items():
            error.update(batch[name], reconstruct(found, name, batch, encodings))
    fires = [meter.figures() for meter in firing.values()]
    return [m.figures().fvu for m in errors.values()], [f.l0 for f in fires], [f.dead for f in fires]


def _pieces(values: Mapping[str, Tensor], rows: int = 4096) -> Iterator[dict[str, Tensor]]:
    for begin in range(0, len(next(iter(values.values()))), rows):
        yield {name: value[begin : begin + rows] for name, value in values.items()}


@torch.no_grad()
def baselines(config: TrainingConfig, data: Data) -> Baselines:
    """What is reached without training at the sites that a config's dictionaries read and write first.

    Sites that are taken together are brought to one scale, as in training. A cross-layer dictionary counts for its own
    layer alone.
    """
    planned, k = plans(config, data.n_layers), config.k_of(0, 1)
    source, fit = data.source(sites(planned)), dict[str, Tensor]()
    for index in range(FIT_BATCHES):
        batch = source.batch(index)
        fit = {name: torch.cat([fit[name], part.float()]) if fit else part.float() for name, part in batch.items()}
    scale = {name: 1 / tensor.std() for name, tensor in fit.items()}
    linear, random = list[float](), list[float]()
    for plan in planned:
        writes = plan.writes[:1] if plan.across else plan.writes
        x, unseen = (torch.cat([of[name] * scale[name] for name in plan.reads], 1) for of in (fit, data.held_out))
        y = torch.cat([fit[name] * scale[name] for name in writes], 1)
        wanted = [data.held_out[name] * scale[name] for name in writes]
        one = principal_components(x, y, k)
        other = random_dictionary(x, y, n_features=config.n_features, k=k, layer=0, read="read", write="write")
        linear += _fvu(wanted, one.approximate(unseen))
        random += _fvu(wanted, other(unseen))
    return Baselines(_mean(linear), _mean(random))


def _fvu(wanted: Sequence[Tensor], written: Tensor) -> list[float]:
    """Of each site, its columns side by side in `written`."""
    found = []
    for y, part in zip(wanted, written.split(wanted[0].shape[1], 1), strict=True):
        meter = ErrorMeter()
        meter.update(y, part)
        found.append(meter.figures().fvu)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


BASELINES = {"transcoder": "MLP", "sae": "residual stream", "crosscoder": "residual stream, its layers at once"}
"""Kinds whose sites the baselines stand for, and what those are called."""


def chosen(options: argparse.Namespace) -> dict[str, TrainingConfig]:
    """The rows that were asked for."""
    rows = {**TABLE, **FROM_CLUSTERS, **OPTIONS}
    every = {name: TrainingConfig(**{**SETTINGS, **changes}) for name, changes in rows.items()}
    return {
        name: config
        for name, config in every.items()
        if config.kind in options.kind and config.sparsity in options.sparsity
        if not options.only or any(words in name for words in options.only)
    }


def store(path: Path, rows: Mapping[str, Figures], needs_none: Mapping[str, Baselines]) -> None:
    """Write figures, beside those of other rows that the file has of the same settings."""
    settings = json.loads(json.dumps(SETTINGS))
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if held.get("settings") != settings:
        held = {"settings": settings, "rows": {}, "baselines": {}}
    held["rows"] |= {name: row._asdict() for name, row in rows.items()}
    held["baselines"] |= {name: one._asdict() for name, one in needs_none.items()}
    write_whole(path, (json.dumps(held, indent=1) + "\n").encode())


def show(rows: Mapping[str, Figures], needs_none: Mapping[str, Baselines]) -> None:
    """Print one table."""
    steps = SETTINGS["tokens"] // SETTINGS["batch_tokens"]
    table = Table(title=f"{SETTINGS['n_features']} features, k {SETTINGS['k']}, {steps} steps, layers 2 and 3 of atlas")
    for name in ("", "start", "FVU", "worst", "L0", "off", "dead", "CPU s"):
        table.add_column(name, justify="right" if name else "left")
    for name, row in rows.items():
        cells = f"{row.start:.3f}", f"{row.fvu:.4f}", f"{row.worst:.4f}", f"{row.l0:.1f}"
        table.add_row(name, *cells, f"{row.off:.0%}", f"{row.dead:.1%}", f"{row.seconds:.1f}")
    table.add_section()
    for kind, one in needs_none.items():
        for what, fvu in (("best affine map", one.components), ("random encoder", one.random)):
            table.add_row(f"{what}: {BASELINES[kind]}", "", f"{fvu:.4f}")
    Console(width=120).print(table)


def main() -> None:
    """Run the chosen rows, print and store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sparsity", nargs="+", choices=SPARSITIES, default=SPARSITIES)
    parser.add_argument("--only", nargs="+", default=(), metavar="WORDS", help="rows whose name holds any of these")
    parser.add_argument("--json", type=Path, help="file for raw figures; rows of other runs stay in it")
    parser.add_argument("--work", type=Path, help="folder that keeps the activations (280 MB)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(options.work or Path(scratch) / "activations", layers=SETTINGS["layers"], batches=BATCHES)
        needs_none = {
            kind: baselines(TrainingConfig(**SETTINGS, kind=kind), data) for kind in BASELINES if kind in options.kind
        }
        rows = dict[str, Figures]()
        for name, config in chosen(options).items():
            rows[name] = measured(config, data)
            print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
            if options.json is not None:
                store(options.json, rows, needs_none)
    show(rows, needs_none)


if __name__ == "__main__":
    main()
