"""Where features start: random directions, sampled tokens, or clusters of tokens.

Works on scaled activations of one dictionary: what it reads and what it should write, each site side by side. Knows
nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.training.clusters import Detectors, cluster_detectors

_SMALL = 0.1
"""Norm of decoder rows that start at tokens, which are much alike: k of them at full length overshoot k times; and of
random rows of a dictionary that does not write where it reads.
"""


def _random(x: Tensor, y: Tensor, sizes: list[int], same: bool, generator: torch.Generator) -> Detectors:
    """Directions drawn at random; a dictionary that writes where it reads starts with its decoder as its encoder."""
    n = sum(sizes)
    rows = torch.nn.functional.normalize(torch.randn(n, x.shape[1], generator=generator), dim=1)
    if same:
        return Detectors(rows, torch.zeros(n), rows.clone())
    written = torch.nn.functional.normalize(torch.randn(n, y.shape[1], generator=generator), dim=1)
    return Detectors(rows, torch.zeros(n), _SMALL * written)


def _samples(x: Tensor, y: Tensor, sizes: list[int], same: bool, generator: torch.Generator) -> Detectors:
    """Directions of tokens of the sample from the mean, each writing what its token wrote."""
    n = sum(sizes)
    chosen = torch.randint(len(x), (n,), generator=generator)
    rows = torch.nn.functional.normalize(x[chosen] - x.mean(0), dim=1)
    written = torch.nn.functional.normalize(y[chosen] - y.mean(0), dim=1)
    return Detectors(rows, -rows @ x.mean(0), _SMALL * written)


def _clusters(x: Tensor, y: Tensor, sizes: list[int], same: bool, generator: torch.Generator) -> Detectors:
    """Detectors of clusters of tokens, coarse to fine by nested prefix."""
    found = cluster_detectors(x, y, sizes=sizes, generator=generator)
    parts = [torch.cat([each[i] for each in found]) for i in range(3)]
    return Detectors(parts[0], parts[1], parts[2] / len(found))


_STARTS: dict[str, Callable[[Tensor, Tensor, list[int], bool, torch.Generator], Detectors]] = {
    "random": _random,
    "samples": _samples,
    "clusters": _clusters,
}


def start(
    name: str,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"],
    *,
    prefixes: tuple[int, ...],
    same: bool,
    generator: torch.Generator,
) -> Detectors:
    """Encoder rows and biases, and decoder rows, to start from.

    prefixes: sizes of the nested dictionaries, the whole one last. same: whether what is written is what is read.
    """
    sizes = [b - a for a, b in pairwise((0, *prefixes))]
    return _STARTS[name](x, y, sizes, same, generator)
