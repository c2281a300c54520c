"""How much each feature of a crosscoder over two models has to do with their predicting different next tokens.

Norms say how much a feature writes otherwise in the stream, not whether anything comes of it. So the second model goes
on from the first one's stream, and the divergence from what it says itself is divided among the features whose rows
differ. Minder et al. 2025, "Overcoming sparsity artifacts in crosscoders to interpret chat-tuning" (arXiv 2504.02922),
judge sets of features so: they swap in what these write in the other model, and measure what of the divergence is left.
Here it is divided among single features by integrated gradients (Sundararajan et al. 2017). Knows activations and a way
on from them to logits; nothing of models, hooks or words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.errors import InputError

STEPS = 8
"""Points of the path between the two models' activations."""

GoOn = Callable[[Float[Tensor, "documents pos d_model"]], Float[Tensor, "documents pos vocab"]]
"""From activations at the crosscoder's site, of all positions, to the second model's logits."""


class Divergence(NamedTuple):
    """A divergence in nats a token, and its parts: `total = features + bias + error + residual`."""

    total: float  #: KL of what the second model says from what it says after the first one's stream
    features: Float[Tensor, " n_features"]
    bias: float  #: of the difference of the two output biases
    error: float  #: of the difference that the crosscoder missed, and of positions that were left out
    residual: float  #: what the path's few points lost
    tokens: int


class DivergenceMeter:
    """Sums over batches from which every feature's part of the divergence follows, in float64.

    With `h(a) = x_first + a (x_second - x_first)` at all positions, and p(h) what the second model predicts when it
    goes on from h, `D(a) = sum KL(p(h(1)) | p(h(a)))` over the tokens falls to D(1) = 0, and feature j's part of D(0)
    is `- integral of dD/dh . f_j (d_j_second - d_j_first) da` from 0 to 1: integrated gradients, along the straight
    path, of what j adds to the difference `x_second - x_first = sum_j f_j (d_j_second - d_j_first) + bias + error`.
    """

    def __init__(self, crosscoder: Crosscoder, *, steps: int = STEPS) -> None:
        """Take a crosscoder; steps: points of the path, midpoints of equal parts.

        Raises `InputError` unless it reads one layer of two models.
        """
        if len(crosscoder.parts) != 2 or len(crosscoder.models) != 2:
            raise InputError(
                f"DivergenceMeter(crosscoder): has the parts {', '.join(crosscoder.parts)}, needs a site of two models"
            )
        if steps < 1:
            raise InputError(f"DivergenceMeter(steps={steps}): needs at least 1")
        self.crosscoder, self.steps = crosscoder, steps
        bias = crosscoder.b_dec.detach()
        rows = crosscoder.W_dec.detach().to(bias.dtype)
        self._rows, self._bias = rows[:, 1] - rows[:, 0], bias[1] - bias[0]
        self._features = torch.zeros(crosscoder.n_features, dtype=torch.float64, device=rows.device)
        self._total = self._biases = self._path = 0.0
        self._tokens = 0

    def add(
        self,
        first: Float[Tensor, "documents pos d_model"],
        second: Float[Tensor, "documents pos d_model"],
        keep: Bool[Tensor, "documents pos"],
        go_on: GoOn,
    ) -> None:
        """Take both models' activations at the same tokens.

        keep: the tokens whose predictions and features count. go_on: the second model's way to logits, of these tokens.
        """
        device, exact = self._rows.device, torch.promote_types(first.dtype, torch.float32)
        first, second = first.to(exact), second.to(exact)
        with torch.no_grad():
            x = torch.cat([first[keep], second[keep]], 1).to(self.crosscoder.b_enc)
            fired = self.crosscoder.encode(x)
            wanted = _log_probabilities(go_on(second)[keep])
            self._total += float(_divergence(wanted, go_on(first)[keep]))
        for step in range(self.steps):
            point = torch.lerp(first, second, (step + 0.5) / self.steps).requires_grad_()
            (slope,) = torch.autograd.grad(_divergence(wanted, go_on(point)[keep]), point)
            self._path -= float((slope.double() * (second - first).double()).sum()) / self.steps
            slope = slope[keep].to(device, self._rows.dtype)
            self._features -= ((slope @ self._rows.T) * fired).sum(0).double() / self.steps
            self._biases -= float((slope @ self._bias).sum()) / self.steps
        self._tokens += int(keep.sum())

    def result(self) -> Divergence:
        """The parts; raises `InputError` where no token was given."""
        if not self._tokens:
            raise InputError("DivergenceMeter: was given no token; give it some held-out text")
        sums = self._total, self._biases, self._path
        total, bias, path = (value / self._tokens for value in sums)
        features = self._features / self._tokens
        error = path - bias - float(features.sum())
        return Divergence(total, features, bias, error, total - path, self._tokens)


def _divergence(wanted: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
    """KL of the wanted log-probabilities from those of logits, all tokens together."""
    return torch.nn.functional.kl_div(_log_probabilities(logits), wanted, reduction="sum", log_target=True)


def _log_probabilities(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
