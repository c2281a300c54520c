"""What a crosscoder over two models says of their difference: decoder norms, decoder angles and latent scaling.

A feature is shared where both models' decoder rows are equally long, and of one model only where the other's is nearly
zero. Training for sparsity can shorten a row that should be there (complete shrinkage), or split a shared concept into
one feature a model (latent decoupling); latent scaling finds both, by asking how much of a feature is in each model's
activations whatever its decoder rows say. Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model
diffing"; Minder et al. 2025, "Overcoming sparsity artifacts in crosscoders to interpret chat-tuning" (arXiv
2504.02922), sections 2 and 3. Knows crosscoders and activations; nothing of where these come from, or of words.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.errors import InputError

ONLY, SHARED = 0.1, (0.4, 0.6)
"""Relative norms: below ONLY, or above 1 - ONLY, a feature is one model's; within SHARED it is both models' (Minder et
al. 2025, section 2)."""
SPECIFIC_RECONSTRUCTION, SPECIFIC_ERROR = 0.5, 0.2
"""A direction is one model's own where both nu, of the reconstruction and of the error, are below these (the same,
section 4)."""
ALIKE = 0.7
"""Cosine of the two decoder rows below which a feature of both models writes different things in them."""


class Kind(StrEnum):
    """What a feature is, by the norms of its two decoder rows and the angle between them."""

    BASE_ONLY = "base only"
    MOSTLY_BASE = "mostly base"
    SHARED = "shared"
    MOSTLY_TUNED = "mostly tuned"
    TUNED_ONLY = "tuned only"
    REWRITTEN = "rewritten"  #: fires for both, and writes one thing in the base model and another in the tuned one
    DEAD = "dead"  #: it fired nowhere


class Scaling(NamedTuple):
    """Latent scaling of one model's decoder rows: how much of a feature is in each model's activations."""

    reconstruction: Float[Tensor, " n_features"]
    """nu^r = beta of the other model / beta of this one, fitted on the reconstructions: finds latent decoupling."""
    error: Float[Tensor, " n_features"]
    """nu^e, the same fitted on what the other features leave of the activations: finds complete shrinkage."""


class ModelDiff(NamedTuple):
    """The figures of every feature of a crosscoder over a base and a tuned model."""

    relative_norm: Float[Tensor, " n_features"]  #: 0: base only, 1/2: equal norms, 1: tuned only
    cosine: Float[Tensor, " n_features"]  #: of the two decoder rows
    of_tuned: Scaling  #: directions of the tuned model: near 0 where the base model lacks them
    of_base: Scaling  #: directions of the base model: near 0 where the tuned model lost them
    rate: Float[Tensor, " n_features"]  #: share of the tokens at which it fires
    peak: Float[Tensor, " n_features"]  #: largest activation
    tokens: int

    @property
    def kinds(self) -> list[Kind]:
        """What each feature is, by `kind_of`; dead where it never fired."""
        figures = zip(self.relative_norm.tolist(), self.cosine.tolist(), self.rate.tolist(), strict=True)
        return [kind_of(norm, cosine) if rate else Kind.DEAD for norm, cosine, rate in figures]

    def is_specific(self, *, tuned: bool = True) -> Bool[Tensor, " n_features"]:
        """Whether latent scaling confirms that a model (the tuned one, or the base) alone has a feature's direction."""
        found = self.of_tuned if tuned else self.of_base
        return (found.reconstruction < SPECIFIC_RECONSTRUCTION) & (found.error < SPECIFIC_ERROR)


def kind_of(relative_norm: float, cosine: float) -> Kind:
    """What a feature with that relative norm and that angle is; see `ONLY`, `SHARED` and `ALIKE`."""
    if relative_norm < ONLY:
        return Kind.BASE_ONLY
    if relative_norm > 1 - ONLY:
        return Kind.TUNED_ONLY
    if cosine < ALIKE:
        return Kind.REWRITTEN
    if SHARED[0] <= relative_norm <= SHARED[1]:
        return Kind.SHARED
    return Kind.MOSTLY_BASE if relative_norm < SHARED[0] else Kind.MOSTLY_TUNED


def relative_norms(
    base: Float[Tensor, "n_features d_out"], tuned: Float[Tensor, "n_features d_out"]
) -> Float[Tensor, " n_features"]:
    """`((|d_tuned| - |d_base|) / max(|d_tuned|, |d_base|) + 1) / 2` (Minder et al. 2025, equation 3): 0 where only the
    base model has the feature, 1 where only the tuned one has; rows are one feature each.
    """
    a, b = base.norm(dim=1), tuned.norm(dim=1)
    return ((b - a) / torch.maximum(a, b).clamp_min(torch.finfo(a.dtype).tiny) + 1) / 2


class LatentScaling:
    """Sums over a stream of tokens from which every feature's latent scaling follows in closed form, in float64.

    For feature j with activation f, decoder row d and a model's target y, `beta = argmin sum |beta f d - y|^2 =
    sum f (d . y) / (|d|^2 sum f^2)` (Minder et al. 2025, section 3). d is the row of the model whose direction is asked
    for; y is, of each model, (r) its reconstruction without the bias, or (e) its activation less all that the other
    features write there, `x - x_hat + f d_model`.
    """

    def __init__(self, crosscoder: Crosscoder) -> None:
        """Take a crosscoder; raises `InputError` unless it reads one layer of two models."""
        if len(crosscoder.parts) != 2 or len(crosscoder.models) != 2:
            raise InputError(
                f"LatentScaling(crosscoder): has the parts {', '.join(crosscoder.parts)}, needs a site of two models; "
                "train one with `circuits diff-models BASE TUNED`"
            )
        self.crosscoder = crosscoder
        n = crosscoder.n_features
        self.rows = crosscoder.W_dec.detach().double()  # [n_features, model, d_out]
        self.tokens = 0
        self._fired, self._peak = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.double)
        self._square = torch.zeros(n, dtype=torch.double)  # sum of f^2
        shape = (2, 2, n)  # the direction's model, the target's model, feature
        self._reconstruction, self._error = torch.zeros(shape).double(), torch.zeros(shape).double()

    @torch.no_grad()
    def add(
        self, base: Float[Tensor, "tokens d_out"], tuned: Float[Tensor, "tokens d_out"]
    ) -> Float[Tensor, "tokens n_features"]:
        """Take both models' activations at the same tokens; returns the features' activations there."""
        x = torch.cat([base.float(), tuned.float()], 1).to(self.rows.device)
        encoded = self.crosscoder.encode(x.to(self.crosscoder.b_enc.dtype))
        f = encoded.double()
        written = torch.einsum("tn,nmd->tmd", f, self.rows)
        missed = x.double().unflatten(1, (2, -1)) - written - self.crosscoder.b_dec.double()
        for model in range(2):
            for own in range(2):  # f^T y for all features at once, then with each one's own direction
                for sums, target in ((self._reconstruction, written), (self._error, missed)):
                    sums[own, model] += (f.T @ target[:, model]).mul(self.rows[:, own]).sum(1)
        square = f.pow(2).sum(0)
        self._square += square
        self._fired += (f > 0).sum(0)
        self._peak = torch.maximum(self._peak, f.max(0).values)
        self.tokens += len(f)
        return encoded

    def betas(self) -> tuple[Float[Tensor, "own model n_features"], Float[Tensor, "own model n_features"]]:
        """The factors of the reconstructions and of the errors: of each model's directions, in each model's target."""
        gram = torch.einsum("nod,nmd->omn", self.rows, self.rows)
        size = (gram.diagonal(dim1=0, dim2=1).T[:, None] * self._square).clamp_min(torch.finfo(torch.double).tiny)
        return self._reconstruction / size, (self._error + gram * self._square) / size

    def result(self) -> ModelDiff:
        """The figures of every feature; raises `InputError` where no token was given."""
        if not self.tokens:
            raise InputError("LatentScaling: was given no token; give it some held-out text")
        reconstruction, error = self.betas()
        base, tuned = self.rows.unbind(1)
        return ModelDiff(
            relative_norm=relative_norms(base, tuned),
            cosine=torch.nn.functional.cosine_similarity(base, tuned, dim=1),
            of_tuned=Scaling(_ratio(reconstruction, 1), _ratio(error, 1)),
            of_base=Scaling(_ratio(reconstruction, 0), _ratio(error, 0)),
            rate=self._fired.double() / self.tokens,
            peak=self._peak,
            tokens=self.tokens,
        )


def _ratio(betas: Float[Tensor, "own model n_features"], own: int) -> Float[Tensor, " n_features"]:
    """nu: the other model's beta over the own one's; NaN for a feature that never fired."""
    return betas[own, 1 - own] / betas[own, own]


def diff(
    crosscoder: Crosscoder, pairs: Iterable[tuple[Float[Tensor, "tokens d_out"], Float[Tensor, "tokens d_out"]]]
) -> ModelDiff:
    """The figures of every feature over a stream of (base, tuned) activations, in memory that does not grow with it."""
    sums = LatentScaling(crosscoder)
    for base, tuned in pairs:
        sums.add(base, tuned)
    return sums.result()
