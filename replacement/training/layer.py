"""One layer's transcoder while it is being trained.

Works on scaled activations (mean squared entry about 1 on both sides) and turns into a plain `Transcoder` with the
scales folded in. Knows nothing of optimisers, other layers or models.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from replacement.activation import BatchTopK, JumpReLU
from replacement.training.clusters import cluster_detectors
from replacement.training.config import TrainingConfig
from replacement.training.sparse import ActiveSet, decode_active, preselect, select
from replacement.transcoder import Transcoder

_SAMPLE_ROWS = 128  # tokens whose pre-activations estimate the threshold
_AUX_ROWS = 512  # tokens that AuxK looks at in one step


class Pass(NamedTuple):
    """One training pass over a batch of tokens, in scaled units."""

    outputs: Float[Tensor, "tokens prefixes d_out"]  #: approximations by the nested dictionaries, the whole one last
    active: ActiveSet
    values: Float[Tensor, " entries"]


class TrainedLayer(nn.Module):
    """Encoder, decoder, optional skip, threshold and scales of one layer."""

    W_enc: nn.Parameter  # [n_features, d_in]
    b_enc: nn.Parameter  # [n_features]
    W_dec: nn.Parameter  # [n_features, d_out]
    b_dec: nn.Parameter  # [d_out]
    W_skip: nn.Parameter | None  # [d_out, d_in]
    threshold: Tensor  # [], above it a feature fires
    input_scale: Tensor  # []
    output_scale: Tensor  # []
    since_fired: Tensor  # [n_features], tokens since a feature last fired
    peak: Tensor  # [n_features], usual highest activation in a batch

    def __init__(
        self,
        inputs: Float[Tensor, "tokens d_in"],
        outputs: Float[Tensor, "tokens d_out"],
        *,
        config: TrainingConfig,
        layer: int,
        n_layers: int,
    ) -> None:
        """Start from a sample: scales and output mean from it, features at its clusters, coarse to fine by prefix."""
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed * 1009 + layer)
        self.layer, self.k = layer, config.k_of(layer, n_layers)
        self.prefixes = (*config.prefixes, config.n_features)
        self.aux_k, self.dead_after, self.floor = config.aux_k, config.dead_after, config.floor
        for name, sample in (("input_scale", inputs), ("output_scale", outputs)):
            self.register_buffer(name, sample.shape[1] ** 0.5 / sample.norm(dim=1).mean())
        x, y = inputs * self.input_scale, outputs * self.output_scale
        sizes = [b - a for a, b in pairwise((0, *self.prefixes))]
        start = cluster_detectors(x, y, sizes=sizes, generator=generator)
        self.W_enc = nn.Parameter(torch.cat([each.W_enc for each in start]))
        self.b_enc = nn.Parameter(torch.cat([each.b_enc for each in start]))
        self.W_dec = nn.Parameter(torch.cat([each.W_dec for each in start]) / len(start))
        self.b_dec = nn.Parameter(y.mean(0))
        self.W_skip = nn.Parameter(torch.zeros(outputs.shape[1], inputs.shape[1])) if config.skip else None
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("since_fired", torch.zeros(config.n_features))
        self.register_buffer("peak", torch.zeros(config.n_features))

    def forward(self, x: Float[Tensor, "tokens d_in"], *, generator: torch.Generator, memory: float) -> Pass:
        """Encode and decode scaled inputs; moves the threshold (kept with weight `memory`) and the firing counters
        along.

        A feature fires when the norm of what it writes, `a |d|`, exceeds the threshold and `a` the floor.
        """
        norms = self.W_dec.detach().norm(dim=1).clamp_min(1e-8)
        rows = torch.randperm(len(x), generator=generator)[:_SAMPLE_ROWS]
        now = self._threshold_for_k(x[rows].detach(), norms)
        self.threshold.copy_(now if self.threshold == 0 else memory * self.threshold + (1 - memory) * now)
        levels = torch.maximum(self.threshold / norms, self.floor * self.peak)
        active = select(preselect(x, self.W_enc / levels[:, None], self.b_enc / levels), 1.0)
        parts, values = decode_active(x, self.W_enc, self.b_enc, self.W_dec, active, self.prefixes)
        fired = torch.bincount(active.feature, minlength=len(self.b_enc)) > 0
        self.since_fired.add_(len(x)).masked_fill_(fired, 0)
        highest = torch.zeros_like(self.peak).scatter_reduce(0, active.feature, values, "amax")
        self.peak.mul_(torch.where(fired, 0.9, 0.998)).add_(0.1 * highest)
        return Pass(parts + (self.b_dec + self.skip(x)).view(-1, 1, len(self.b_dec)), active, values)

    def skip(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"] | float:
        """`W_skip x` in scaled units."""
        return 0.0 if self.W_skip is None else x @ self.W_skip.T

    def aux_loss(
        self, x: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens d_out"], generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """AuxK: mean squared difference of `error` (held fixed) and its reconstruction by the `aux_k` strongest dead
        features.
        """
        dead = (self.since_fired > self.dead_after).nonzero().flatten()
        if len(dead) == 0:
            return error.new_zeros(())
        rows = torch.randperm(len(x), generator=generator)[:_AUX_ROWS]
        pre = F.relu(F.linear(x[rows].detach(), self.W_enc[dead], self.b_enc[dead]))
        least = pre.detach().topk(min(self.aux_k, len(dead)), dim=1).values[:, -1:]
        rebuilt = (pre * (pre >= least)) @ self.W_dec[dead]
        return (error[rows].detach() - rebuilt).pow(2).mean()

    @torch.no_grad()
    def reopen(self, *, widen: float, k: int | None) -> None:
        """Let features fire more widely from here on: shift their biases by `widen` (ending the floor) and change k."""
        self.k = k or self.k
        if widen:
            self.b_enc.add_(widen)
            self.floor = 0.0
            self.threshold.zero_()

    @torch.no_grad()
    def _threshold_for_k(self, x: Float[Tensor, "tokens d_in"], norms: Float[Tensor, " n_features"]) -> Tensor:
        """The threshold on `a |d|` that k features a token pass on average, of those above their floor."""
        pre = F.linear(x, self.W_enc, self.b_enc)
        written = torch.where(pre > self.floor * self.peak, pre * norms, 0.0).flatten()
        return written.topk(self.k * len(x)).values[-1].clamp_min(1e-4)

    def calibrate(self, inputs: Float[Tensor, "tokens d_in"]) -> None:
        """Set the threshold so that k features a token fire on average over these unscaled inputs."""
        norms = self.W_dec.detach().norm(dim=1).clamp_min(1e-8)
        self.threshold.copy_(self._threshold_for_k(inputs * self.input_scale, norms))

    def _unit_norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoder, its bias, decoder and peaks with decoder rows of norm 1, what a feature writes unchanged."""
        norms = self.W_dec.norm(dim=1).clamp_min(1e-8)
        return self.W_enc * norms[:, None], self.b_enc * norms, self.W_dec / norms[:, None], self.peak * norms

    @torch.no_grad()
    def dictionary(self, *, read: str, write: str) -> Transcoder:
        """The same map as a `Transcoder` on unscaled activations: input scale in the encoder, output scale in the
        decoder.

        Decoder rows have norm 1 in the trainer's units, so that one threshold for all features compares what they
        write.
        """
        W_enc, b_enc, W_dec, peak = self._unit_norm()
        skip = None if self.W_skip is None else self.W_skip * (self.input_scale / self.output_scale)
        return Transcoder(
            layer=self.layer,
            read=read,
            write=write,
            W_enc=W_enc * self.input_scale,
            b_enc=b_enc,
            W_dec=W_dec / self.output_scale,
            b_dec=self.b_dec / self.output_scale,
            activation=self._activation(peak),
            W_skip=skip,
        )

    def _activation(self, peak: Float[Tensor, " n_features"]) -> BatchTopK | JumpReLU:
        """One threshold for all features, or with a floor one for each."""
        if not self.floor:
            return BatchTopK(self.threshold.clone(), self.k)
        return JumpReLU(torch.maximum(self.threshold, self.floor * peak))
