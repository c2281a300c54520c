"""Where features start: random directions, sampled tokens, or clusters of tokens, alone or sharing what they write.

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

_DRAWN = 1 << 12  # rows drawn at once; pieces of 16 numbers and their multiples equal one draw of all
_SMALL = 0.1
"""Norm of decoder rows that start at tokens, which are much alike: k of them at full length overshoot k times; and of
random rows of a dictionary that does not write where it reads.
"""


def _random(
    x: Tensor, y: Tensor, sizes: list[int], tied: float | None, own: slice, generator: torch.Generator
) -> Detectors:
    """Directions drawn at random, from the mean of what is read: what is written has its mean in a bias already.

    A dictionary that writes where it reads starts with its decoder as its encoder, at later sites too.
    """
    n = sum(sizes)
    rows = torch.nn.functional.normalize(_drawn(n, x.shape[1], own, generator).to(x.device), dim=1)
    bias = -(rows * x.mean(0)).sum(1)  # row by row: the same bits however many rows a process holds
    if tied is not None:
        return Detectors(rows, bias, tied * rows.repeat(1, y.shape[1] // x.shape[1]))
    written = torch.nn.functional.normalize(_drawn(n, y.shape[1], own, generator).to(x.device), dim=1)
    return Detectors(rows, bias, _SMALL * written)


def _drawn(n: int, width: int, own: slice, generator: torch.Generator) -> Float[Tensor, "own width"]:
    """Some rows of `torch.randn(n, width)`, the same that drawing all would give, in the memory of few."""
    kept = []
    for begin in range(0, n, _DRAWN):
        piece = torch.randn(min(_DRAWN, n - begin), width, generator=generator)
        kept.append(piece[max(0, own.start - begin) : max(0, own.stop - begin)])
    return torch.cat(kept)


def _samples(
    x: Tensor, y: Tensor, sizes: list[int], tied: float | None, own: slice, generator: torch.Generator
) -> Detectors:
    """Directions of tokens of the sample from the mean, each writing what its token wrote."""
    chosen = torch.randint(len(x), (sum(sizes),), generator=generator)[own].to(x.device)
    rows = torch.nn.functional.normalize(x[chosen] - x.mean(0), dim=1)
    written = torch.nn.functional.normalize(y[chosen] - y.mean(0), dim=1)
    return Detectors(rows, -rows @ x.mean(0), _SMALL * written)


def _clusters(
    x: Tensor, y: Tensor, sizes: list[int], tied: float | None, own: slice, generator: torch.Generator
) -> Detectors:
    """Detectors of clusters of tokens, coarse to fine by nested prefix; found on the CPU, alike wherever x is."""
    found = cluster_detectors(x.cpu(), y.cpu(), sizes=sizes, generator=generator)
    parts = [torch.cat([each[i] for each in found])[own].to(x.device) for i in range(3)]
    return Detectors(parts[0], parts[1], parts[2] / len(found))


_STARTS: dict[str, Callable[[Tensor, Tensor, list[int], float | None, slice, torch.Generator], Detectors]] = {
    "random": _random,
    "samples": _samples,
    "clusters": _clusters,
    "shared_clusters": _clusters,
}


def start(
    name: str,
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"],
    *,
    prefixes: tuple[int, ...],
    k: int,
    tied: float | None,
    own: slice,
    generator: torch.Generator,
) -> Detectors:
    """Encoder rows and biases, and decoder rows, to start from.

    prefixes: sizes of the nested dictionaries, the whole one last. k: features that fire at a token, among which shared
    clusters divide what they write. tied: where what is written is what is read, the length of random decoder rows that
    start as their encoder rows. own: the features wanted; the generator moves as for all of them.
    """
    sizes = [b - a for a, b in pairwise((0, *prefixes))]
    rows = _STARTS[name](x, y, sizes, tied, own, generator)
    return rows._replace(W_dec=rows.W_dec / k) if name == "shared_clusters" else rows
