"""ReLU with L1, JumpReLU and Gated: sparsity by a penalty."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from replacement.activation import JumpReLU, ReLU
from replacement.training.config import TrainingConfig
from replacement.training.parallel import Mesh
from replacement.training.sparse import ActiveSet
from replacement.training.sparsity.base import Encoder, Exported, Penalised, positive

Norms = Callable[[], Tensor]

_TANH_SCALE = 4.0  # c of Anthropic, January 2025
_QUADRATIC_WEIGHT = 1.0
_LOWEST = 0.05  # of a threshold, in bandwidths


class ReLUSparsity(Penalised):
    """`max(pre, 0)` with the penalty `sum a |d|` (Bricken et al. 2023; Anthropic, April 2024)."""

    def prepare(self, x: Tensor, encoder: Encoder) -> Tensor:
        return self.bias_to_start(x, encoder, self.first_k * self.k)

    def select(self, x: Tensor, encoder: Encoder, *, generator: torch.Generator, memory: float) -> ActiveSet:
        return positive(x, encoder)

    def activations(self, values: Tensor, active: ActiveSet, b_enc: Tensor) -> Tensor:
        return torch.relu(values)

    def extra_loss(self, values: Tensor, activations: Tensor, active: ActiveSet, norms: Norms) -> Tensor:
        fires = self.fires(activations, active)
        self.aim(values, active, fires=fires, wanted=self.wanted())
        penalty = self.mesh.features.add(_l1(activations, active, norms(), self.k))
        return self.controlled(fires) * penalty

    def export(self, encoder: Encoder) -> Exported:
        return Exported((encoder.norms,), encoder.b_enc * encoder.norms, ReLU())


def _l1(activations: Tensor, active: ActiveSet, norms: Tensor, k: int) -> Tensor:
    """`sum a |d|` per token, over k."""
    return (activations * norms[active.feature.long()]).sum() / (active.n_tokens * k)


class JumpReLUSparsity(Penalised):
    """`pre * (pre > threshold)` with a learned threshold a feature (Rajamanoharan et al. 2024).

    Penalty "tanh": `sum tanh(4 a |d|)`, its weight moved by the controller (Anthropic, January 2025). "quadratic":
    `(L0 / k - 1)^2` of the batch. The step's derivative is a box of width `bandwidth` around the threshold, and flows
    to the threshold and to the pre-activation, so to all parameters of the encoder. A threshold is kept at a twentieth
    of the bandwidth or more: its gradient is proportional to it, and at 0 it would be stuck. What L0 is brought to k by
    beside the penalty goes to thresholds and biases in equal parts: thresholds alone can't go below the least of them,
    and biases alone change what features write.
    """

    threshold: nn.Parameter  # [n_features], float32, learned as it is: its logarithm hardly moves under Adam
    tied_length = 0.3  # tanh is flat where a |d| is large, and its weight ran away before rows had become short

    def __init__(self, config: TrainingConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.bandwidth, self.quadratic = config.bandwidth, config.penalty == "quadratic"
        self.threshold = nn.Parameter(torch.zeros(self.n_own))

    def prepare(self, x: Tensor, encoder: Encoder) -> Tensor:
        with torch.no_grad():
            self.threshold.fill_(self.bandwidth)
        return self.bias_to_start(x, encoder, self.first_k * self.k) + self.bandwidth

    def select(self, x: Tensor, encoder: Encoder, *, generator: torch.Generator, memory: float) -> ActiveSet:
        with torch.no_grad():
            self.threshold.clamp_min_(_LOWEST * self.bandwidth)  # where the last step left it below
        return positive(x, encoder, self.bandwidth / 2 - self.threshold.detach())

    def levels(self, encoder: Encoder) -> Tensor:
        return self.threshold.detach().clamp_min(_LOWEST * self.bandwidth)

    def fresh(self, b_enc: Tensor) -> dict[nn.Parameter, Tensor]:
        return {self.threshold: torch.full_like(b_enc, self.bandwidth)}

    @torch.no_grad()
    def nudge(self, b_enc: nn.Parameter) -> None:
        if b_enc.requires_grad:
            b_enc.add_(self.due / 2)
            self.threshold.sub_(self.due / 2)

    def activations(self, values: Tensor, active: ActiveSet, b_enc: Tensor) -> Tensor:
        return _Jump.apply(values, self.threshold[active.feature.long()], self.bandwidth)

    def extra_loss(self, values: Tensor, activations: Tensor, active: ActiveSet, norms: Norms) -> Tensor:
        threshold, fires = self.threshold[active.feature.long()], self.fires(activations, active)
        wanted = torch.full_like(fires, self.k) if self.quadratic else self.wanted()
        self.aim(values - threshold, active, fires=fires, wanted=wanted)
        if self.quadratic:
            l0 = _Step.apply(values, threshold, self.bandwidth).sum() / active.n_tokens
            l0 = self.mesh.data.mean(self.mesh.features.add(l0))
            return _QUADRATIC_WEIGHT * (l0 / self.k - 1).square()
        written = activations * norms()[active.feature.long()]
        penalty = self.mesh.features.add(torch.tanh(_TANH_SCALE * written).sum())
        return self.controlled(fires) * penalty / (active.n_tokens * self.k)

    def export(self, encoder: Encoder) -> Exported:
        threshold = self.levels(encoder) * encoder.norms
        return Exported((encoder.norms,), encoder.b_enc * encoder.norms, JumpReLU(threshold))


class GatedSparsity(Penalised):
    """A gate chooses, a magnitude path with tied directions measures (Rajamanoharan et al. 2024, "Gated").

    With `g = x W_enc^T + b_enc`: `a = [g > 0] relu(exp(r_mag) (g - b_enc) + b_mag)`, so that what features write
    teaches nothing to the gate's bias. The penalty is L1 on `relu(g) |d|`, d held fixed, and the gate also reconstructs
    by itself through the frozen decoder (the trainer adds that loss). The finished dictionary is the JumpReLU that it
    equals: rows `exp(r_mag) W_enc`, threshold `b_mag - exp(r_mag) b_enc`.
    """

    r_mag: nn.Parameter  # [n_features]
    b_mag: nn.Parameter  # [n_features], starts as the gate's bias

    def __init__(self, config: TrainingConfig, mesh: Mesh) -> None:
        super().__init__(config, mesh)
        self.r_mag = nn.Parameter(torch.zeros(self.n_own))
        self.b_mag = nn.Parameter(torch.zeros(self.n_own))

    def prepare(self, x: Tensor, encoder: Encoder) -> Tensor:
        b_enc = self.bias_to_start(x, encoder, self.first_k * self.k)
        with torch.no_grad():
            self.b_mag.copy_(b_enc)
        return b_enc

    def select(self, x: Tensor, encoder: Encoder, *, generator: torch.Generator, memory: float) -> ActiveSet:
        return positive(x, encoder)

    def levels(self, encoder: Encoder) -> Tensor:
        """Where the gate is open and the magnitude positive."""
        return (encoder.b_enc - self.b_mag.detach() * (-self.r_mag.detach()).exp()).clamp_min(0.0)

    def fresh(self, b_enc: Tensor) -> dict[nn.Parameter, Tensor]:
        return {self.r_mag: torch.zeros_like(b_enc), self.b_mag: b_enc}

    @torch.no_grad()
    def reopen(self, *, widen: float, k: int | None) -> None:
        super().reopen(widen=widen, k=k)
        self.b_mag.add_(widen * self.r_mag.exp())  # as the gate's bias

    @torch.no_grad()
    def nudge(self, b_enc: nn.Parameter) -> None:
        super().nudge(b_enc)
        if b_enc.requires_grad:
            self.b_mag.add_(self.due * self.r_mag.exp())  # or what the gate lets through would still be below 0

    def activations(self, values: Tensor, active: ActiveSet, b_enc: Tensor) -> Tensor:
        feature = active.feature.long()
        gate = values.detach() > 0
        linear = values - b_enc[feature]  # of the gate's bias no gradient is left
        return torch.relu(self.r_mag.exp()[feature] * linear + self.b_mag[feature]) * gate

    def extra_loss(self, values: Tensor, activations: Tensor, active: ActiveSet, norms: Norms) -> Tensor:
        fires, scale = self.fires(activations, active), self.r_mag.detach().exp()[active.feature.long()]
        above = torch.minimum(values.detach(), activations.detach() / scale)  # gate and magnitude: both have to be
        self.aim(above, active, fires=fires, wanted=self.wanted())
        penalty = self.mesh.features.add(_l1(torch.relu(values), active, norms().detach(), self.k))
        return self.controlled(fires) * penalty

    def export(self, encoder: Encoder) -> Exported:
        """`a = pre [pre > max(threshold, 0)]`, `pre = exp(r_mag) (g - b_enc) + b_mag`: gates open at the threshold."""
        scale, b_mag, norms = self.r_mag.detach().exp(), self.b_mag.detach(), encoder.norms
        threshold = (b_mag - scale * encoder.b_enc).clamp_min(0.0)
        return Exported((scale, norms), b_mag * norms, JumpReLU(threshold * norms))


class _Jump(torch.autograd.Function):
    """`v [v > t]`, whose step has a box of width `bandwidth` as its derivative."""

    @staticmethod
    def forward(ctx, values, threshold, bandwidth):
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return values * (values > threshold)

    @staticmethod
    def backward(ctx, grad):
        values, threshold = ctx.saved_tensors
        box = ((values - threshold).abs() < ctx.bandwidth / 2) * (threshold / ctx.bandwidth)
        return grad * ((values > threshold) + box), -grad * box, None


class _Step(torch.autograd.Function):
    """`[v > t]`, with a box of width `bandwidth` as its derivative."""

    @staticmethod
    def forward(ctx, values, threshold, bandwidth):
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx, grad):
        values, threshold = ctx.saved_tensors
        box = ((values - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return grad * box, -grad * box, None
