"""What is done for dead features: those that have not fired for `dead_after` tokens.

| name | does |
| --- | --- |
| auxk | the strongest dead features of a token rebuild what the live ones missed (Gao et al. 2024, appendix A.2) |
| ghost | all dead features together do so, through an exponential, scaled to half the error (Jermyn et al. 2024) |
| preactivation | dead features are pulled towards firing: `sum relu(threshold - pre) |d|` (Anthropic, January 2025) |
| resample | a dead feature starts again at a token that is badly rebuilt (Bricken et al. 2023) |

Under a penalty the dead are below 0 at all tokens; there AuxK takes each at its own strongest tokens (`at_own_tokens`).
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
from replacement.training.sparse import ActiveSet, decode_active

ROWS = 512
"""Tokens that a remedy looks at in one step."""
_ENCODER_SHARE = 0.2  # norm of a resampled encoder row, in mean norms of the living


class Missed(NamedTuple):
    """What the living features of one dictionary missed, at those tokens looked at that this process sees."""

    error: Float[Tensor, "rows d_out"]  #: a constant
    k: int  #: dead features that take part in AuxK at a token
    n_dead: int  #: dead features of all processes
    rows: int  #: tokens looked at by all processes
    mesh: Mesh


class Dead(NamedTuple):
    """The dead features that this process holds, at every token looked at."""

    pre: Float[Tensor, "rows dead"]  #: pre-activations, with gradients
    W_dec: Float[Tensor, "dead d_out"]
    level: Float[Tensor, " dead"]  #: pre-activation above which each fires


class Chosen(NamedTuple):
    """What takes part in AuxK, with `pre - least` as its activation."""

    active: ActiveSet
    least: Float[Tensor, " entries"]  #: a constant, not above 0


@torch.no_grad()
def strongest(pre: Float[Tensor, "rows dead"], dead: Int[Tensor, " dead"], n_features: int, missed: Missed) -> Chosen:
    """The dead features that take part in AuxK: the k strongest of all processes at each token, where they are above 0.

    dead: which of the `n_features` of this process the columns of `pre` are, ascending.
    """
    place = pre.topk(min(missed.k, len(dead)), dim=1).indices.sort(dim=1).values
    fired = F.relu(pre.gather(1, place))
    least = missed.mesh.features.largest(fired, min(missed.k, missed.n_dead))[:, -1:]
    token, column = ((fired > 0) & (fired >= least)).nonzero().unbind(1)
    return Chosen(ActiveSet(token, dead[place[token, column]], len(pre), n_features), pre.new_zeros(len(token)))


@torch.no_grad()
def at_own_tokens(
    pre: Float[Tensor, "rows dead"], dead: Int[Tensor, " dead"], n_features: int, missed: Missed, share: float
) -> Chosen:
    """Every dead feature at that share of the tokens where it is strongest, or wherever it is above 0 if that is more.

    `a_ti = max(pre_ti - least_i, 0)`, `least_i` feature i's largest pre-activation at the tokens left out, at most 0:
    as if its bias let it fire as often as the features that live. Under a penalty, dead features have no pre-activation
    above 0 and got no gradient from `strongest`. A form of our own: of those tried it revives most, at the lowest FVU.
    """
    count = max(1, round(share * missed.rows))
    highest = missed.mesh.data.largest(pre.T, min(count + 1, missed.rows))
    least = highest[:, -1].clamp_max(0.0)
    token, column = (pre > least).nonzero().unbind(1)
    return Chosen(ActiveSet(token, dead[column], len(pre), n_features), least[column])


def auxk(
    activations: Float[Tensor, " entries"], W_dec: Float[Tensor, "n_features d_out"], active: ActiveSet, missed: Missed
) -> Float[Tensor, ""]:
    """AuxK's loss from the activations of the chosen."""
    rebuilt = missed.mesh.features.add(decode_active(activations, W_dec, active)[:, 0])
    return _mean((missed.error - rebuilt).pow(2), missed)


def _ghost(dead: Dead, missed: Missed) -> Tensor:
    fired = dead.pre.clamp_max(10.0).exp()
    rebuilt = missed.mesh.features.add(fired @ dead.W_dec)
    size = missed.error.norm(dim=1, keepdim=True) / (2 * rebuilt.detach().norm(dim=1, keepdim=True) + 1e-8)
    loss = _mean((missed.error - rebuilt * size).pow(2), missed)
    before, now = (missed.mesh.data.average(each.detach()) for each in (_mean(missed.error.pow(2), missed), loss))
    return loss * (before / (now + 1e-8))


def _preactivation(dead: Dead, missed: Missed) -> Tensor:
    """The norms are held fixed: below 0 a feature could else lower the loss by writing less, and its level rises."""
    short = F.relu(dead.level - dead.pre) * dead.W_dec.detach().norm(dim=1)
    return missed.mesh.features.add(_mean(short, missed, width=missed.n_dead))


def _mean(x: Float[Tensor, "rows columns"], missed: Missed, *, width: int = 0) -> Float[Tensor, ""]:
    """The mean over rows that are spread over processes, as a loss: the mean over processes of what each returns.

    width: columns of all processes where those are spread too; 0 for `x`'s own.
    """
    if missed.mesh.world.size == 1:
        return x.mean()
    return x.sum() * (missed.mesh.data.size / (missed.rows * (width or x.shape[1])))


LOSSES: dict[str, Callable[[Dead, Missed], Tensor]] = {"ghost": _ghost, "preactivation": _preactivation}
"""Remedies that add a loss of all dead features; that of AuxK is of chosen ones alone."""


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
    fire, as far as this process has them. same: whether the dictionary writes where it reads, and perhaps later;
    then the encoder reads the error's direction there. own: which of the n this process holds.
    """
    badness = mesh.data.fetched(error.pow(2).sum(1), torch.arange(len(x) * mesh.data.size)).cpu()
    chosen: Int[Tensor, " dead"] = torch.multinomial(badness + 1e-12, n, True, generator=generator)[own]
    W_dec = F.normalize(mesh.data.fetched(error, chosen), dim=1)
    alive, lengths = mesh.features.count(len(living)), mesh.features.total(living.norm(dim=1).sum())
    length = _ENCODER_SHARE * (lengths / alive if alive else x.new_ones(()))
    mean = mesh.data.average(x.mean(0))
    towards = F.normalize(W_dec[:, : x.shape[1]] if same else mesh.data.fetched(x, chosen) - mean, dim=1)
    W_enc = towards * length
    return Fresh(W_enc, 0.1 * length - W_enc @ mean, W_dec)
