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

ROWS = 512
"""Tokens that a remedy looks at in one step."""
_ENCODER_SHARE = 0.2  # norm of a resampled encoder row, in mean norms of the living


class Dead(NamedTuple):
    """The dead features of one dictionary, with the tokens that are looked at."""

    pre: Float[Tensor, "rows dead"]  #: pre-activations, with gradients
    W_dec: Float[Tensor, "dead d_out"]
    error: Float[Tensor, "rows d_out"]  #: what the living missed, a constant
    k: int
    level: Float[Tensor, " dead"]  #: pre-activation above which each fires


def _auxk(dead: Dead) -> Tensor:
    pre = F.relu(dead.pre)
    least = pre.detach().topk(min(dead.k, pre.shape[1]), dim=1).values[:, -1:]
    return (dead.error - (pre * (pre >= least)) @ dead.W_dec).pow(2).mean()


def _ghost(dead: Dead) -> Tensor:
    fired = dead.pre.clamp_max(10.0).exp()
    rebuilt = fired @ dead.W_dec
    size = dead.error.norm(dim=1, keepdim=True) / (2 * rebuilt.detach().norm(dim=1, keepdim=True) + 1e-8)
    loss = (dead.error - rebuilt * size).pow(2).mean()
    return loss * (dead.error.pow(2).mean() / (loss.detach() + 1e-8))


def _preactivation(dead: Dead) -> Tensor:
    return (F.relu(dead.level - dead.pre) * dead.W_dec.norm(dim=1)).mean()


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
    generator: torch.Generator,
) -> Fresh:
    """Rows at tokens drawn by their squared error: the decoder along the error, the encoder along the input.

    living: encoder rows of the features that fire. same: whether the dictionary writes where it reads; then the encoder
    reads the error's direction.
    """
    chosen: Int[Tensor, " dead"] = torch.multinomial(error.pow(2).sum(1) + 1e-12, n, True, generator=generator)
    W_dec = F.normalize(error[chosen], dim=1)
    length = _ENCODER_SHARE * (living.norm(dim=1).mean() if len(living) else x.new_ones(()))
    towards = W_dec if same else F.normalize(x[chosen] - x.mean(0), dim=1)
    W_enc = towards * length
    return Fresh(W_enc, 0.1 * length - W_enc @ x.mean(0), W_dec)
