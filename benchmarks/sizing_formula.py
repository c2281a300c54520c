"""What training runs need by formula (docs/sizing.md): memory of a process, tokens a second of a GPU. Nothing is run.

    python benchmarks/sizing_formula.py [--products 400] [--memory 2000] [--network 200]
    python benchmarks/sizing_formula.py --own LAYERS WIDTH FEATURES WRITTEN PARAMETERS PROCESSES SHARDS BATCH

The second adds a run of your own: layers read, width of a site, features of one dictionary, layers that a feature
writes on average, the language model's parameters, processes, over how many of them features are spread, tokens of a
batch. Rates are what a GPU really reaches, by default two fifths of the bfloat16 peak and three fifths of the memory's
rate of one with 80 GB. Nothing overlaps in these times, and rows that several tokens name are read for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

K = 64  # active features a token, of one dictionary


class Run(NamedTuple):
    """A training run on stored or harvested activations."""

    name: str
    layers: int  #: read, a dictionary each
    width: int  #: of a site
    features: int  #: of one dictionary
    written: float  #: layers that a feature writes, on average
    parameters: float  #: of the language model
    processes: int
    shards: int  #: processes that share the features
    batch: int  #: tokens of a step
    sites: int  #: read or written

    @property
    def weights(self) -> float:
        """Of all dictionaries."""
        return self.layers * self.features * self.width * (1 + self.written)


class Rates(NamedTuple):
    """What one GPU reaches, a second."""

    products: float  #: operations of bfloat16 products
    memory: float  #: bytes
    network: float  #: bytes that it sends


def runs() -> Iterator[Run]:
    """The page's examples."""
    small, large = 124e6, 2.6e9
    yield Run("SAE, d 768", 1, 768, 24_576, 1, small, 1, 1, 32_768, 1)
    yield Run("transcoders, 12 layers, d 768", 12, 768, 24_576, 1, small, 1, 1, 32_768, 24)
    yield Run("CLT, 12 layers, d 768", 12, 768, 24_576, 6.5, small, 8, 2, 32_768, 24)
    yield Run("CLT, 26 layers, d 2304, 1 M", 26, 2304, 38_400, 13.5, large, 64, 32, 32_768, 52)
    yield Run("CLT, 26 layers, d 2304, 10 M", 26, 2304, 384_000, 13.5, large, 256, 256, 8_192, 52)


def held(run: Run) -> float:
    """Bytes of weights, gradients and Adam's moments in each process."""
    return 16 * run.weights / run.shards


def of_batch(run: Run) -> float:
    """Bytes of a batch in each process: what is written, and its error, of every site."""
    return 16 * run.batch * run.shards / run.processes * run.sites * run.width


def parts(run: Run, rates: Rates) -> dict[str, float]:
    """Seconds of each part of a step."""
    n, data = run.processes, run.processes // run.shards
    rows = 4 * K * run.width * (2 + 3 * run.written) * run.layers  # bytes a token: values, decoding, three gradients
    written = 0 if run.shards == 1 else run.sites / 2 * 8 * run.width * run.batch / data  # a sum over processes
    gradients = 0 if data == 1 else 8 * run.weights / run.shards
    return {
        "the model": 2 * run.parameters * run.batch / n / rates.products,
        "choosing": 2 * run.width * run.features * run.layers * run.batch / n / rates.products,
        "active rows": rows * run.batch / n / rates.memory,
        "Adam": 36 * run.weights / run.shards / rates.memory,  # 28, and 8 for the gradient itself and its norm
        "sending": (written + gradients) / rates.network,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=float, default=400, help="tera operations a second")
    parser.add_argument("--memory", type=float, default=2000, help="gigabytes a second")
    parser.add_argument("--network", type=float, default=200, help="gigabytes a second between GPUs")
    names = [name.upper() for name in Run._fields[1:-1]]
    parser.add_argument("--own", type=float, nargs=len(names), metavar=tuple(names))
    given = parser.parse_args()
    rates = Rates(given.products * 1e12, given.memory * 1e9, given.network * 1e9)
    wanted = list(runs())
    if given.own:
        layers, width, features, written, parameters, processes, shards, batch = given.own
        if int(processes) % max(1, int(shards)) or min(given.own) <= 0:
            parser.error("--own: needs numbers above 0, and PROCESSES a multiple of SHARDS")
        whole = (int(number) for number in (processes, shards, batch, 2 * layers))
        wanted.append(Run("your own", int(layers), int(width), int(features), written, parameters, *whole))
    head = (
        "run",
        "processes",
        "batch",
        "weights",
        "held",
        "allow",
        "a batch",
        "tokens/s a GPU",
        "a step's largest part",
    )
    rows = [head]
    for run in wanted:
        seconds = parts(run, rates)
        total, largest = sum(seconds.values()), max(seconds, key=lambda part: seconds[part])
        rows.append(
            (
                run.name,
                f"{run.processes} ({run.processes // run.shards} x {run.shards})",
                f"{run.batch:,}",
                f"{run.weights / 1e9:,.2g} G" if run.weights < 1e10 else f"{run.weights / 1e9:,.0f} G",
                *(f"{size / 1e9:,.2g} GB" for size in (held(run), 2 * held(run), of_batch(run))),
                f"{float(f'{run.batch / total / run.processes:.2g}'):,.0f}",
                f"{largest}, {seconds[largest] / total:.0%} of {1e3 * total:,.0f} ms",
            )
        )
    print("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(head), *rows[1:]]))


if __name__ == "__main__":
    main()
