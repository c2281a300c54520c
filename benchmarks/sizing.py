"""What a run needs of memory and time in several processes on this machine: bytes a feature, tokens a second.

    python benchmarks/sizing.py [--width 256] [--features 8192] [--steps 6] [--repeat 3]

Trains a cross-layer transcoder of two layers on random activations with `--features` and twice as many features, in
fresh processes, and prints how much the peak memory of the largest process grew for each more feature of a layer, and
that over what its weights, gradients and Adam's two moments take in one process (`x formula`: 16 bytes a weight, over
the processes that share features). Each is printed as lowest to highest of `--repeat` runs: peaks are of what the
allocator took, and vary by half and more with what else the machine does. Tokens a second are those of the smaller
one, all processes together; on one machine they share its cores. `writing` is what the process that grew most took
beyond what it held when training was over, while the finished dictionaries of the larger one were written. Needs
Linux.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peers.measure import memory_peak, reset_memory_peak

from replacement.training import Activations, TrainingConfig, plans, train
from replacement.training.export import export
from replacement.training.parallel import ALONE, mesh_of
from replacement.training.report import Record

WAYS = ((1, 1), (2, 1), (2, 2))  # processes, and over how many of them features are spread
LAYERS = 2


class Noise:
    """Random activations."""

    def __init__(self, sites: tuple[str, ...], width: int) -> None:
        self.sites, self.width = sites, width

    def batch(self, index: int) -> Activations:
        generator = torch.Generator().manual_seed(index)
        return {site: torch.randn(1024, self.width, generator=generator) for site in self.sites}


class Figures(NamedTuple):
    """Of one run."""

    peak: float  #: bytes of the largest process
    speed: float  #: tokens a second
    writing: float  #: bytes that writing the dictionaries took at most, in one process


def measure(rank: int, size: int, shards: int, config: TrainingConfig, width: int, folder: str) -> None:
    """Train in this process, as one of several, and leave its figures in the folder."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    planned, records = plans(config, LAYERS), list[Record]()
    source = Noise(tuple(dict.fromkeys(name for plan in planned for name in plan.reads + plan.writes)), width)
    mesh = mesh_of(shards) if size > 1 else ALONE
    trainee = train(source, planned, config=config, listeners=[records.append], show_progress=False, mesh=mesh)
    speed = 0.0
    if records:
        seconds = records[-1].seconds - records[0].seconds  # without the first step, which sets memory up
        speed = (records[-1].tokens - records[0].tokens) / seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = reset_memory_peak()
    export(trainee, Path(folder, "dictionaries"), metadata={})
    Path(folder, f"figures-{rank}").write_text(f"{peak} {speed} {memory_peak() - held}", encoding="utf-8")
    if size > 1:
        dist.destroy_process_group()


def run(size: int, shards: int, config: TrainingConfig, width: int) -> Figures:
    """The figures of one run in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (size, shards, config, width, folder), nprocs=size)
        found = [map(float, path.read_text().split()) for path in Path(folder).glob("figures-*")]
    return Figures(*(max(figures) for figures in zip(*found, strict=True)))


def main() -> None:
    """Measure every way and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    common = {"kind": "clt", "k": 16, "batch_tokens": 1024, "tokens": 1024 * given.steps, "buffer_bytes": 8_000_000}
    weights = sum(1 + LAYERS - layer for layer in range(LAYERS)) * given.width / LAYERS  # of a feature, on average
    print(f"a feature has {weights:.0f} weights on average; x 16 bytes = {16 * weights:,.0f}")
    whole = 4 * weights * LAYERS * 2 * given.features / 1e6
    print(f"the dictionaries of the larger one are {whole:.0f} MB")
    print(
        f"{'processes':>9} {'data':>5} {'features':>8} {'bytes/feature':>17} {'x formula':>12} {'tokens/s':>11}"
        f" {'writing, MB':>11}"
    )
    for size, shards in WAYS:
        pairs = [
            [run(size, shards, TrainingConfig(**common, n_features=n), given.width) for n in sizes]  # type: ignore[arg-type]
            for sizes in [(given.features, 2 * given.features)] * given.repeat
        ]
        each = [(large.peak - small.peak) / (LAYERS * given.features) for small, large in pairs]
        shares = [bytes_ / (16 * weights / shards) for bytes_ in each]
        speeds, writing = [small.speed for small, _ in pairs], [large.writing / 1e6 for _, large in pairs]
        print(
            f"{size:9} {size // shards:5} {shards:8} {spread(each, ',.0f'):>17} {spread(shares, '.1f'):>12}"
            f" {spread(speeds, ',.0f'):>11} {spread(writing, ',.0f'):>11}",
            flush=True,
        )


def spread(values: list[float], form: str) -> str:
    """The lowest and the highest."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


if __name__ == "__main__":
    main()
