"""What switch and Kronecker encoders cost and give beside the linear one, at equal features, on atlas's activations.

    python benchmarks/encoders.py

Every row trains a transcoder of one layer on the same batches, with one thread. `ms/encode`: CPU time of choosing the
active features of a batch and computing their values, with the trained weights; `ms/step`: of a whole training step,
its mean over the run. FVU and L0 are the finished dictionary's on held-out tokens. `busiest`: the share of held-out
tokens that go to the busiest expert, where there are any.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from replacement.encoding import Switch  # noqa: E402
from replacement.loading import load_bridge  # noqa: E402
from replacement.training import Trainee, TrainingConfig, plans, train  # noqa: E402
from replacement.training.data import BridgeActivations, open_tokens  # noqa: E402
from replacement.training.kinds import sites  # noqa: E402

HELD_OUT = 4  # batches
ROWS: tuple[tuple[str, dict], ...] = (
    ("linear", {"encoder": "linear"}),
    ("switch, 8 experts", {"encoder": "switch", "experts": 8}),
    ("switch, 32 experts", {"encoder": "switch", "experts": 32}),
    ("kronecker, 1 x 2", {"encoder": "kronecker", "pairs": (1, 2)}),
    ("kronecker, 2 x 4", {"encoder": "kronecker", "pairs": (2, 4)}),
    ("kronecker, 4 x 8", {"encoder": "kronecker", "pairs": (4, 8)}),
)


class Figures(NamedTuple):
    """One row."""

    parameters: int
    encode: float  #: seconds
    step: float  #: seconds
    fvu: float
    l0: float
    dead: float
    busiest: float | None


class Kept:
    """Activations in memory, batch by batch."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches, self.sites = batches, tuple(batches[0])

    def batch(self, index: int) -> dict[str, Tensor]:
        """The index-th batch, over and over where there are fewer."""
        return self.batches[index % len(self.batches)]


def harvest(config: TrainingConfig, batches: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `config.batch_tokens` activations each."""
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    tokens = open_tokens("atlas", model=bridge, context=64)
    names = sites(plans(config, len(bridge.blocks)))
    source = BridgeActivations(bridge, tokens, sites=names, documents=64, dtype=torch.bfloat16)
    waiting: dict[str, Tensor] = {}
    index = 0
    for _ in range(batches):
        while not waiting or len(waiting[names[0]]) < config.batch_tokens:
            more = source.batch(index)
            waiting = {name: torch.cat([waiting[name], more[name]]) if waiting else more[name] for name in names}
            index += 1
        yield {name: part[: config.batch_tokens].clone() for name, part in waiting.items()}
        waiting = {name: part[config.batch_tokens :] for name, part in waiting.items()}


def measure(config: TrainingConfig, source: Kept, held_out: list[dict[str, Tensor]]) -> Figures:
    """Train one row and look at what came of it."""
    planned = plans(config, max(config.layers) + 1)
    clocks = [time.process_time()]
    dead: list[float] = []

    def listen(record) -> None:
        clocks.append(time.process_time())
        dead.append(record.dead)

    trainee = train(source, planned, config=config, listeners=[listen], show_progress=False)
    (coder,), (dictionary,) = trainee, trainee.dictionaries()
    read, write = planned[0].reads[0], planned[0].writes[0]
    missed = total = l0 = 0.0
    experts = torch.zeros(config.experts)
    with torch.no_grad():
        for batch in held_out:
            x, y = batch[read].float(), batch[write].float()
            missed += float((dictionary(x) - y).pow(2).sum())
            total += float((y - y.mean(0)).pow(2).sum())
            l0 += float((dictionary.encode(x) != 0).sum() / len(x)) / len(held_out)
            if isinstance(dictionary.encoding, Switch):
                experts += torch.bincount(dictionary.encoding.route(x).expert, minlength=config.experts)
    return Figures(
        parameters=sum(p.numel() for p in (coder.W_enc, coder.b_enc, *coder.scheme.parameters())),
        encode=_encode_seconds(trainee, held_out),
        step=(clocks[-1] - clocks[4]) / (len(clocks) - 5),
        fvu=missed / total,
        l0=l0,
        dead=dead[-1],
        busiest=float(experts.max() / experts.sum()) if experts.any() else None,
    )


@torch.no_grad()
def _encode_seconds(trainee: Trainee, batches: list[dict[str, Tensor]]) -> float:
    (coder,) = trainee
    inputs, generator = [trainee.read(coder, batch) for batch in batches], torch.Generator().manual_seed(0)
    took = []
    for _ in range(3):
        for x in inputs:
            began = time.process_time()
            active = coder.sparsity.select(x, coder.encoder(), generator=generator, memory=1.0)
            coder.scheme.values(x, coder.W_enc, coder.b_enc, active)
            took.append(time.process_time() - began)
    return statistics.median(took)


def main() -> None:
    """Run all rows and print one table for every number of features."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--sparsity", choices=("batchtopk", "topk"), default="batchtopk")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    common = {"layers": (options.layer,), "k": options.k, "sparsity": options.sparsity, "warmup_steps": 15}
    common |= {"batch_tokens": options.batch_tokens, "tokens": options.steps * options.batch_tokens, "buffer_bytes": 1}
    common |= {"learning_rate": 4e-3, "betas": (0.5, 0.95), "start": "samples"}
    batches = list(harvest(TrainingConfig(**common), options.steps + HELD_OUT))
    source, held_out = Kept(batches[:-HELD_OUT]), batches[-HELD_OUT:]
    for features in options.features:
        table = Table(title=f"{features:,} features, {options.sparsity}, k {options.k}, {options.steps} steps")
        for name in ("encoder", "encoder parameters", "ms/encode", "ms/step", "FVU", "L0", "dead", "busiest"):
            table.add_column(name, justify="left" if name == "encoder" else "right")
        for name, changes in ROWS:
            row = measure(TrainingConfig(**common, n_features=features, **changes), source, held_out)
            print(f"{features} {name}: {row}", file=sys.stderr)
            busiest = "" if row.busiest is None else f"{row.busiest:.1%}"
            cells = f"{row.parameters:,}", f"{row.encode * 1e3:.1f}", f"{row.step * 1e3:.1f}", f"{row.fvu:.4f}"
            table.add_row(name, *cells, f"{row.l0:.1f}", f"{row.dead:.1%}", busiest)
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
