"""What is done for dead features: those that have not fired for `dead_after` tokens.

| name | does |
| --- | --- |
| auxk | the strongest dead features of a token rebuild what the live ones missed (Gao et al. 2024, appendix A.2) |
| ghost | all dead features together do so, through an exponential, scaled to half the error (Jermyn et al. 2024) |
| preactivation | dead features are pulled towards firing: `sum relu(threshold - pre) |d|` (Anthropic, January 2025) |
| resample | a dead feature starts again at a token that is badly rebuilt (Bricken et al. 2023) |

Each looks at dead features alone, on a sample of the batch's tokens. Knows nothing of the loss that these join.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from replacement.training.parallel import Mesh

ROWS = 512
"""Tokens that a remedy looks at in one step."""
_ENCODER_SHARE = 0.2  # norm of a resampled encoder row, in mean norms of the living


class Dead(NamedTuple):
    """The dead features of one dictionary that this process holds, with those tokens looked at that it sees."""

    pre: Float[Tensor, "rows dead"]  #: pre-activations, with gradients
    W_dec: Float[Tensor, "dead d_out"]
    error: Float[Tensor, "rows d_out"]  #: what the living missed, a constant
    k: int
    level: Float[Tensor, " dead"]  #: pre-activation above which each fires
    n_dead: int  #: dead features of all processes
    rows: int  #: tokens looked at by all processes
    mesh: Mesh


def _auxk(dead: Dead) -> Tensor:
    pre = F.relu(dead.pre)
    least = dead.mesh.features.largest(pre.detach(), min(dead.k, dead.n_dead))[:, -1:]
    rebuilt = dead.mesh.features.add((pre * (pre >= least)) @ dead.W_dec)
    return _mean((dead.error - rebuilt).pow(2), dead)


def _ghost(dead: Dead) -> Tensor:
    fired = dead.pre.clamp_max(10.0).exp()
    rebuilt = dead.mesh.features.add(fired @ dead.W_dec)
    size = dead.error.norm(dim=1, keepdim=True) / (2 * rebuilt.detach().norm(dim=1, keepdim=True) + 1e-8)
    loss = _mean((dead.error - rebuilt * size).pow(2), dead)
    missed, now = (dead.mesh.data.average(each.detach()) for each in (_mean(dead.error.pow(2), dead), loss))
    return loss * (missed / (now + 1e-8))


def _preactivation(dead: Dead) -> Tensor:
    short = F.relu(dead.level - dead.pre) * dead.W_dec.norm(dim=1)
    return dead.mesh.features.add(_mean(short, dead, width=dead.n_dead))


def _mean(x: Float[Tensor, "rows columns"], dead: Dead, *, width: int = 0) -> Float[Tensor, ""]:
    """The mean over rows that are spread over processes, as a loss: the mean over processes of what each returns.

    width: columns of all processes where those are spread too; 0 for `x`'s own.
    """
    if dead.mesh.world.size == 1:
        return x.mean()
    return x.sum() * (dead.mesh.data.size / (dead.rows * (width or x.shape[1])))


LOSSES: dict[str, Callable[[Dead], Tensor]] = {"auxk": _auxk, "ghost": _ghost, "preactivation": _preactivation}
"""Remedies that add to the loss."""


class Fresh(NamedTuple):
    """New rows for features that start again."""

    W_enc: Float[Tensor, "dead d_in"]
    b_enc: Float[Tensor, " dead"]
    W_dec: Float[Tensor, "dead d_out"]


def resampled(
    n: int,
    x: Float[Tensor, "tokens d_in"],
    error: Float[Tensor, "tokens d_out"],
    *,
    living: Float[Tensor, "alive d_in"],
    same: bool,
    own: slice,
    mesh: Mesh,
    generator: torch.Generator,
) -> Fresh:
    """Rows at tokens drawn by their squared error: the decoder along the error, the encoder along the input.

    n: dead features of all processes. x, error, living: inputs, what was missed, and encoder rows of the features that
    fire, as far as this process has them. same: whether the dictionary writes where it reads; then the encoder reads
    the error's direction. own: which of the n this process holds.
    """
    badness = mesh.data.fetched(error.pow(2).sum(1), torch.arange(len(x) * mesh.data.size)).cpu()
    chosen: Int[Tensor, " dead"] = torch.multinomial(badness + 1e-12, n, True, generator=generator)[own]
    W_dec = F.normalize(mesh.data.fetched(error, chosen), dim=1)
    alive, lengths = mesh.features.count(len(living)), mesh.features.total(living.norm(dim=1).sum())
    length = _ENCODER_SHARE * (lengths / alive if alive else x.new_ones(()))
    mean = mesh.data.average(x.mean(0))
    towards = W_dec if same else F.normalize(mesh.data.fetched(x, chosen) - mean, dim=1)
    W_enc = towards * length
    return Fresh(W_enc, 0.1 * length - W_enc @ mean, W_dec)
