"""Where features start: at clusters of tokens, each with a linear detector of its own.

Clusters are found in inputs and outputs together, without labels. Knows nothing of training.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

_ROUNDS = 10  # Lloyd iterations
_CANDIDATES = 4  # tried for each seed


class Detectors(NamedTuple):
    """An affine detector of each cluster: 1/2 at the cluster's mean, about -1/2 at the mean of all tokens."""

    W_enc: Float[Tensor, "clusters d_in"]
    b_enc: Float[Tensor, " clusters"]
    W_dec: Float[Tensor, "clusters d_out"]  #: twice the cluster's mean output, measured from the mean of all


def cluster_detectors(
    x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], *, sizes: list[int], generator: torch.Generator
) -> list[Detectors]:
    """Detectors of clusters of tokens, coarse to fine: one set for each of `sizes`.

    The last, finest set is k-means on `(x, y)`; the others merge its clusters by Ward's linkage, each cluster counting
    once however often it occurs. For each cluster, the direction that tells it from all tokens: `w = S^-1 (c - m)` with
    S the covariance of x (ridge 1 % of its mean), scaled so that `w (c - m) = 1`.
    """
    points = torch.cat([x, y], 1)
    fine = k_means(points, n=sizes[-1], generator=generator)
    sets = [fine]
    if len(sizes) > 1:
        used, fine = fine.unique(return_inverse=True)
        centres = torch.zeros(len(used), points.shape[1]).index_add_(0, fine, points)
        tree = linkage((centres / torch.bincount(fine)[:, None]).double().numpy(), method="ward")
        coarse = [torch.from_numpy(fcluster(tree, n, criterion="maxclust")).long() - 1 for n in sizes[:-1]]
        sets = [*(merged[fine] for merged in coarse), sets[0]]
    return [_detectors(x, y, label, n) for label, n in zip(sets, sizes, strict=True)]


def _detectors(x: Tensor, y: Tensor, label: Tensor, n: int) -> Detectors:
    mean_x, mean_y = x.mean(0), y.mean(0)
    size = torch.bincount(label, minlength=n).clamp_min(1)[:, None]
    centre_x = torch.zeros(n, x.shape[1]).index_add_(0, label, x - mean_x) / size
    centre_y = torch.zeros(n, y.shape[1]).index_add_(0, label, y - mean_y) / size
    covariance = (x - mean_x).T @ (x - mean_x) / len(x)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    direction = torch.linalg.solve(covariance + ridge, centre_x.T).T
    direction = direction / (direction * centre_x).sum(1, keepdim=True).clamp_min(1e-6)
    return Detectors(direction, -direction @ mean_x - 0.5, 2 * centre_y)


def k_means(points: Float[Tensor, "tokens width"], *, n: int, generator: torch.Generator) -> Tensor:
    """Cluster of each point, in 0..n-1; a cluster can end up empty."""
    centres = points[_seeds(points, n, generator)]
    for _ in range(_ROUNDS):
        label = _nearest(points, centres)
        size = torch.bincount(label, minlength=n)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, label, points)
        centres = torch.where(size > 0, sums / size.clamp_min(1), centres)
    return _nearest(points, centres)


def _seeds(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: candidates are drawn by squared distance to the nearest seed, and the best one stays."""
    square = points.square().sum(1)
    least = torch.full_like(square, torch.inf)
    chosen = torch.randint(len(points), (1,), generator=generator)
    seeds: list[Tensor] = []
    for _ in range(n):
        distance = square[:, None] + square[chosen] - 2 * points @ points[chosen].T
        distance = torch.minimum(least[:, None], distance.clamp_min(0))
        best = distance.sum(0).argmin()
        seeds.append(chosen[best])
        least = distance[:, best].contiguous()
        chosen = torch.multinomial(least + 1e-9, _CANDIDATES, generator=generator)
    return torch.stack(seeds)


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
