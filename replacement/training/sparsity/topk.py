"""TopK and BatchTopK: a fixed number of features, at every token or on average over a batch."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.activation import Activation, BatchTopK, JumpReLU, TopK
from replacement.training.config import TrainingConfig
from replacement.training.parallel import Mesh
from replacement.training.sparse import ActiveSet
from replacement.training.sparsity.base import Encoder, Exported, Sparsity

_SAMPLE_ROWS = 128  # tokens whose pre-activations estimate the threshold
_CHUNK = 1 << 20  # pre-activations held at once
_LEAST = 1e-4  # of a threshold


class TopKSparsity(Sparsity):
    """The k largest pre-activations of every token (Gao et al. 2024, without their ReLU)."""

    def select(self, x: Tensor, encoder: Encoder, *, generator: torch.Generator, memory: float) -> ActiveSet:
        active = encoder.top(x, self.k)
        return active if self.mesh.features.size == 1 else self._cut(x, encoder, active)

    @torch.no_grad()
    def _cut(self, x: Tensor, encoder: Encoder, active: ActiveSet) -> ActiveSet:
        """Of every process's k largest at each token the k largest of all; between equals the lower feature."""
        axis, own = self.mesh.features, min(self.k, self.n_own)
        values = encoder.values(x, active).view(-1, own)
        of_all = axis.gathered(values).transpose(0, 1).flatten(1)
        first = of_all.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        kept = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, first, True)
        at = kept[:, axis.place * own : (axis.place + 1) * own].flatten().nonzero().flatten()
        pre = values.flatten()[at]
        return ActiveSet(active.token[at], active.feature[at], active.n_tokens, active.n_features, pre)

    def export(self, encoder: Encoder) -> Exported:
        """Rows keep their length: which are the largest would change with it."""
        return Exported((), encoder.b_enc, TopK(self.k), unit_rows=False)


class BatchTopKSparsity(Sparsity):
    """k features a token on average (Bussmann et al. 2024), by a running threshold on what a feature writes, `a |d|`.

    The threshold is estimated on a sample of each batch and remembered, so that training chooses as inference does.
    With a floor, a feature fires only above that share of its own usual peak.
    """

    threshold: Tensor  # [], above it a feature fires
    peak: Tensor  # [n_features], usual highest activation in a batch

    def __init__(self, config: TrainingConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.floor = config.floor
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("peak", torch.zeros(self.n_own))

    def select(self, x: Tensor, encoder: Encoder, *, generator: torch.Generator, memory: float) -> ActiveSet:
        data = self.mesh.data
        rows = data.tokens_of(torch.randperm(len(x) * data.size, generator=generator)[:_SAMPLE_ROWS])
        now = self._threshold_for_k(x[rows].detach(), encoder)
        self.threshold.copy_(now if self.threshold == 0 else memory * self.threshold + (1 - memory) * now)
        return encoder.above(x, self.levels(encoder))

    def levels(self, encoder: Encoder) -> Tensor:
        return torch.maximum(self.threshold / encoder.norms, self.floor * self.peak)

    def observe(self, values: Tensor, active: ActiveSet, fired: Tensor) -> None:
        highest = torch.zeros_like(self.peak).scatter_reduce(0, active.feature.long(), values, "amax")
        self.peak.mul_(torch.where(fired, 0.9, 0.998)).add_(0.1 * self.mesh.data.highest(highest))

    @torch.no_grad()
    def _threshold_for_k(self, x: Float[Tensor, "tokens d_in"], encoder: Encoder) -> Tensor:
        """The threshold on `a |d|` that k features a token pass on average, of those above their floor; every process
        has some of the tokens and of the features.

        Looked for among what is above half the running threshold, where that is enough; the answer is the same.
        """
        wanted = self.k * self.mesh.data.count(len(x))
        for least in (self.threshold / 2, torch.zeros_like(self.threshold)):
            near = torch.cat([self._written(piece, encoder, least) for piece in x.split(self._rows)])
            if self.mesh.world.count(len(near)) >= wanted:
                return self._last_of(near, wanted).clamp_min(_LEAST)
        return torch.full_like(self.threshold, _LEAST)

    def _last_of(self, near: Float[Tensor, " entries"], wanted: int) -> Float[Tensor, ""]:
        """The least of the `wanted` largest entries of all processes."""
        if self.mesh.world.size == 1:
            return near.kthvalue(len(near) - wanted + 1).values  # needs no sorting
        return self.mesh.world.largest(near, wanted)[-1]

    def _written(self, x: Float[Tensor, "tokens d_in"], encoder: Encoder, least: Tensor) -> Float[Tensor, " entries"]:
        """What features write, `a |d|`, where that is above `least` and they are above their floor."""
        pre = encoder.dense(x)
        written = pre * encoder.norms
        return written[(written > least) & (pre > self.floor * self.peak) if self.floor else written > least]

    @property
    def _rows(self) -> int:
        """Tokens whose pre-activations are held at once."""
        return max(1, _CHUNK // self.n_own)

    def calibrate(self, x: Float[Tensor, "tokens d_in"], encoder: Encoder) -> None:
        self.threshold.copy_(self._threshold_for_k(x, encoder))

    def reopen(self, *, widen: float, k: int | None) -> None:
        super().reopen(widen=widen, k=k)
        if widen:
            self.floor = 0.0
            self.threshold.zero_()

    def export(self, encoder: Encoder) -> Exported:
        """One threshold for all features; one for each with a floor, or where rows are shared and keep their length."""
        if encoder.scheme.shares_rows:
            levels = self.levels(encoder)
            kept: Activation = JumpReLU(levels) if self.floor else BatchTopK(levels, self.k)
            return Exported((), encoder.b_enc, kept, unit_rows=False)
        norms, activation = encoder.norms, BatchTopK(self.threshold.clone(), self.k)
        if self.floor:
            activation = JumpReLU(torch.maximum(self.threshold, self.floor * self.peak * norms))  # type: ignore[assignment]
        return Exported((norms,), encoder.b_enc * norms, activation)
