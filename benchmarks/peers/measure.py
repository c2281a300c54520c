"""What every row of the training benchmark shares: activations from a file, clocks, memory, FVU; prints one JSON line.

Needs torch and numpy alone, so that it runs inside any peer's environment. Knows no tool.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_UNTIMED = 3  # first steps, in which memory is touched for the first time
_HELD_OUT = 8192  # tokens at the end of the file that nobody trains on
_FLOOR_EVERY = 10  # steps


class Floor:
    """What a step seems to need at least: the encoder's product (fp32), and Adam's pass over the weights.

    Measured between the steps of a row, as machines change their pace within minutes; by a process of its own, so that
    it takes none of the row's memory.
    """

    def __init__(self, batch_tokens: int, width: int, features: int) -> None:
        sizes = [str(size) for size in (batch_tokens, width, features)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cpu: list[float] = []  #: seconds of each time
        self.wall = 0.0  #: seconds of all times together
        self.run()  # once it is there
        self.cpu, self.wall = [], 0.0

    def run(self) -> None:
        """Once more."""
        assert self.process.stdin is not None and self.process.stdout is not None
        start = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.cpu.append(float(self.process.stdout.readline()))
        self.wall += time.perf_counter() - start

    @staticmethod
    def serve(batch_tokens: int, width: int, features: int) -> None:
        """Print the CPU seconds of a product and a pass for every line of the standard input."""
        torch.set_num_threads(1)
        x, W, out = (
            torch.randn(*size) for size in ((batch_tokens, width), (features, width), (batch_tokens, features))
        )
        weights = [torch.nn.Parameter(torch.randn(features, width)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        adam = torch.optim.Adam(weights, fused=True)
        for _ in sys.stdin:
            start = time.process_time()
            torch.mm(x, W.T, out=out)
            adam.step()
            print(time.process_time() - start, flush=True)


class Activations:
    """Batches of a file of float32 rows `x | y`, in order; tells when each is asked for."""

    def __init__(self, path: Path, width: int, batch_tokens: int, steps: int, floor: Floor) -> None:
        self.path, self.width, self.batch_tokens, self.steps, self.floor = path, width, batch_tokens, steps, floor
        self.started: list[tuple[float, float]] = []  #: CPU and wall clock at the request of each batch

    def read(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Rows from `start` on: what is read and what is to be written."""
        count = tokens * 2 * self.width
        rows = np.fromfile(self.path, dtype=np.float32, count=count, offset=start * 2 * self.width * 4)
        return torch.from_numpy(rows.reshape(tokens, 2, self.width)).unbind(1)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """The index-th training batch, over and over where there are fewer."""
        if index == len(self.started):
            self.started.append((time.process_time(), time.perf_counter()))
            if index % _FLOOR_EVERY == _UNTIMED + 1:
                self.floor.run()
        x, y = self.read(index % self.steps * self.batch_tokens, self.batch_tokens)
        return x.contiguous(), y.contiguous()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch(index) for index in range(1 << 62))

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of tokens that no step has seen."""
        for start in range(0, _HELD_OUT, self.batch_tokens):
            yield self.read(self.steps * self.batch_tokens + start, min(self.batch_tokens, _HELD_OUT - start))


def arguments() -> argparse.Namespace:
    """The command line of a row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--features", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--batch-tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float)
    return parser.parse_args()


def measure(
    options: argparse.Namespace,
    train: Callable[[Activations], Callable[[Tensor], tuple[Tensor, float]]],
    *,
    target: int,
) -> None:
    """Run one row and print its figures.

    train: trains on the activations and returns a function from inputs to approximations and L0. target: 0 where
    inputs are rebuilt, 1 where outputs are.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    floor = Floor(options.batch_tokens, options.width, options.features)
    activations = Activations(options.data, options.width, options.batch_tokens, options.steps, floor)
    activations.read(0, options.batch_tokens)
    before = reset_memory_peak()
    approximate = train(activations)
    cpu, wall = time.process_time(), time.perf_counter() - floor.wall
    peak = memory_peak()
    began = activations.started[min(_UNTIMED, len(activations.started) - 1)]
    timed = options.steps - min(_UNTIMED, len(activations.started) - 1)
    missed = total = l0 = tokens = 0.0
    sums = torch.zeros(options.width, dtype=torch.float64)
    with torch.no_grad():
        for pair in activations.held_out():
            wanted = pair[target].double()
            made, count = approximate(pair[0].contiguous())
            missed += float((wanted - made.double()).pow(2).sum())
            total += float(wanted.pow(2).sum())
            sums += wanted.sum(0)
            l0 += count * len(wanted)
            tokens += len(wanted)
    print(
        json.dumps(
            {
                "tokens_per_cpu_second": timed * options.batch_tokens / (cpu - began[0]),
                "tokens_per_second": timed * options.batch_tokens / (wall - began[1]),
                "floor_seconds": statistics.median(floor.cpu),
                "peak_bytes": peak - before,
                "fvu": missed / (total - float(sums.pow(2).sum()) / tokens),
                "l0": l0 / tokens,
            }
        )
    )


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def reset_memory_peak() -> int:
    """Resident memory now; the peak is counted from here where the system allows it."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's alone; what loading left behind would hide what comes now
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_peak() -> int:
    """Largest resident memory since then."""
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    Floor.serve(*(int(size) for size in sys.argv[1:]))
