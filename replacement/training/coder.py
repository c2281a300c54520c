"""One dictionary while it is being trained: encoder, decoder to all sites that it writes, sparsity, counters.

Works on scaled activations (mean squared entry about 1). Knows nothing of optimisers, of other dictionaries or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from replacement.training import dead as remedies
from replacement.training.config import CLUSTERED, TrainingConfig
from replacement.training.kinds import Plan
from replacement.training.parallel import Mesh
from replacement.training.schemes import scheme
from replacement.training.sparse import ActiveSet, decode_active
from replacement.training.sparsity import Encoder, GatedSparsity, Penalised, norms_of, sparsity
from replacement.training.starts import start


class Pass(NamedTuple):
    """One training pass over a batch of tokens, in scaled units; of the features that this process holds."""

    parts: Float[Tensor, "tokens prefixes n_writes d_out"]  #: what the nested dictionaries write, the whole one last
    active: ActiveSet
    activations: Float[Tensor, " entries"]
    penalty: Tensor | float  #: of all features
    gate: Float[Tensor, "tokens 1 n_writes d_out"] | None  #: what a gate alone writes, through the frozen decoder

    def add_to(self, parts: dict[str, list[Tensor]], gates: dict[str, list[Tensor]], writes: Sequence[str]) -> None:
        """Append what is written at each of these sites to the site's list: `[tokens, prefixes, d_out]`."""
        for lists, written in ((parts, self.parts), (gates, self.gate)):
            if written is not None:
                # one gradient of all sites together, where an index a site would make one each
                for name, at_site in zip(
                    writes, written.unbind(2) if len(writes) > 1 else [written.squeeze(2)], strict=True
                ):
                    lists[name].append(at_site)


class Coder(nn.Module):
    """Encoder, decoder, optional skip and sparsity of one dictionary.

    Where several processes hold the features, this has a row of each that is this process's, in the order of all.
    """

    W_enc: nn.Parameter  # [rows, d_in], all read sites side by side; one row a feature in linear and switch encoders
    b_enc: nn.Parameter  # [rows]
    W_dec: nn.Parameter  # [n_features, n_writes, d_out]
    W_skip: nn.Parameter | None  # [d_out, d_in]
    since_fired: Tensor  # [n_features], tokens since a feature last fired

    def __init__(
        self,
        plan: Plan,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens n_writes d_out"],
        *,
        config: TrainingConfig,
        shared: int,
        mesh: Mesh,
    ) -> None:
        """Start from a sample of scaled activations.

        config: of this dictionary. shared: dictionaries that write to the same sites, so that each starts with its
        share.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed * 1009 + plan.layer)
        self.plan, self.mesh = plan, mesh
        held = mesh.features.rows_of(config.width)
        self.prefixes = tuple(min(max(0, p - held.start), held.stop - held.start) for p in config.prefixes)
        self.same = plan.reads == plan.writes[: len(plan.reads)]
        self.dead, self.dead_k, self.dead_after = config.dead, config.dead_k, config.dead_after
        self.scheme = scheme(config, x.shape[1]).to(x.device)
        self.sparsity = sparsity(config, mesh).to(x.device)
        # clusters are of what a layer's own MLP does; what they are worth to later layers is for training to find
        own = y[:, :1] if plan.across and config.start in CLUSTERED else y
        rows = start(
            config.start,
            x,
            own.flatten(1),
            prefixes=(*config.prefixes, config.width) if not self.scheme.shares_rows else (self.scheme.n_rows,),
            k=self.sparsity.k,
            tied=self.sparsity.tied_length if self.same else None,
            own=mesh.features.rows_of(self.scheme.n_rows),
            generator=generator,
        )
        rows = self.scheme.prepare(rows, x, generator)
        self.W_enc = nn.Parameter(rows.W_enc)
        W_dec = y.new_zeros(len(rows.W_dec), *y.shape[1:])
        W_dec[:, : own.shape[1]] = rows.W_dec.unflatten(1, own.shape[1:]) / (shared if own is y else 1)
        self.W_dec = nn.Parameter(W_dec)
        self.b_enc = nn.Parameter(rows.b_enc)
        self.W_skip = nn.Parameter(x.new_zeros(y.shape[2], x.shape[1])) if plan.skip else None
        self.register_buffer("since_fired", x.new_zeros(held.stop - held.start))
        with torch.no_grad():
            self.b_enc.copy_(self.sparsity.prepare(x, self.encoder()))

    @property
    def layer(self) -> int:
        """The block whose site is read, the first one where there are several."""
        return self.plan.layer

    def encoder(self) -> Encoder:
        """The encoder as it is, without gradients."""
        return Encoder(self.W_enc.detach(), self.b_enc.detach(), self.W_dec.detach(), self.scheme)

    def forward(self, x: Float[Tensor, "tokens d_in"], *, generator: torch.Generator, memory: float) -> Pass:
        """Encode and decode scaled inputs; moves running thresholds (kept with weight `memory`) and firing counters."""
        x = self.mesh.features.share(x)
        active = self.sparsity.select(x, self.encoder(), generator=generator, memory=memory)
        values = self.scheme.values(x, self.W_enc, self.b_enc, active)
        activations = self.sparsity.activations(values, active, self.b_enc)
        self._observe(activations.detach(), active)
        activations = self._weighted(activations, x, active)
        parts = decode_active(activations, self.W_dec.flatten(1), active, self.prefixes)
        gate = None
        if isinstance(self.sparsity, GatedSparsity):
            gate = decode_active(torch.relu(values), self.W_dec.detach().flatten(1), active, ())
            gate = gate.unflatten(2, self.W_dec.shape[1:])
        penalty = self.sparsity.extra_loss(values, activations, active, lambda: norms_of(self.W_dec))
        penalty = penalty + self.scheme.extra_loss(x, self.mesh.data)
        return Pass(parts.unflatten(2, self.W_dec.shape[1:]), active, activations, penalty, gate)

    def _weighted(
        self, activations: Float[Tensor, " entries"], x: Float[Tensor, "tokens d_in"], active: ActiveSet
    ) -> Float[Tensor, " entries"]:
        weight = self.scheme.weight(x)
        return activations if weight is None else activations * weight[active.token]

    @torch.no_grad()
    def _observe(self, activations: Float[Tensor, " entries"], active: ActiveSet) -> None:
        fires = (activations != 0).float()
        fired = self.mesh.data.any(fires.new_zeros(len(self.W_dec)).index_add_(0, active.feature, fires) > 0)
        self.since_fired.add_(active.n_tokens * self.mesh.data.size).masked_fill_(fired, 0)
        self.sparsity.observe(activations, active, fired)

    def skip(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"] | float:
        """`W_skip x` in scaled units."""
        return 0.0 if self.W_skip is None else x @ self.W_skip.T

    # ---- dead features

    def is_dead(self) -> Bool[Tensor, " n_features"]:
        """Which features have not fired for `dead_after` tokens."""
        return self.since_fired > self.dead_after

    def dead_loss(
        self, x: Float[Tensor, "tokens d_in"], error: Float[Tensor, "tokens n_writes d_out"], generator: torch.Generator
    ) -> Tensor:
        """The loss that the remedy for dead features adds, those of all processes together; `error`, what the living
        missed, is held fixed.
        """
        if self.dead not in ("auxk", *remedies.LOSSES):
            return error.new_zeros(())
        dead = self.is_dead().nonzero().flatten()
        count, data = self.mesh.features.count(len(dead)), self.mesh.data
        if count == 0:
            return error.new_zeros(())
        chosen = torch.randperm(len(x) * data.size, generator=generator)[: remedies.ROWS]
        rows = data.tokens_of(chosen).to(x.device)
        seen = x[rows].detach()
        missed = remedies.Missed(error[rows].detach().flatten(1), self.dead_k, count, len(chosen), self.mesh)
        if self.dead == "auxk":
            with torch.no_grad():
                pre = self.scheme.dense(seen, self.W_enc, self.b_enc, dead)
            if isinstance(self.sparsity, Penalised):
                share = self.sparsity.k / self.sparsity.n_features
                active, least = remedies.at_own_tokens(pre, dead, len(self.W_dec), missed, share)
            else:
                active, least = remedies.strongest(pre, dead, len(self.W_dec), missed)
            activations = self.scheme.values(seen, self.W_enc, self.b_enc, active) - least
            return remedies.auxk(self._weighted(activations, seen, active), self.W_dec.flatten(1), active, missed)
        pre = self.scheme.dense(seen, self.W_enc, self.b_enc, dead)
        W_dec, level = self.W_dec[dead].flatten(1), self.sparsity.levels(self.encoder())[dead]
        return remedies.LOSSES[self.dead](remedies.Dead(pre, W_dec, level), missed)

    @torch.no_grad()
    def resample(
        self,
        x: Float[Tensor, "tokens d_in"],
        error: Float[Tensor, "tokens n_writes d_out"],
        *,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
    ) -> int:
        """Let dead features start again at tokens that are badly rebuilt, their optimiser state at zero; how many."""
        if self.dead != "resample":
            return 0
        dead, axis = self.is_dead(), self.mesh.features
        counts = axis.gathered(dead.sum()).tolist()
        if not sum(counts):
            return 0
        before = sum(counts[: axis.place])
        fresh = remedies.resampled(
            sum(counts),
            x,
            error.flatten(1),
            living=self.W_enc[~dead],
            same=self.same,
            own=slice(before, before + counts[axis.place]),
            mesh=self.mesh,
            generator=generator,
        )
        new = {self.W_enc: fresh.W_enc, self.W_dec: fresh.W_dec.unflatten(1, self.W_dec.shape[1:])}
        new |= self.sparsity.fresh(fresh.b_enc) | {self.b_enc: fresh.b_enc}
        for parameter, rows in new.items():
            parameter[dead] = rows
            for name, state in optimizer.state.get(parameter, {}).items():
                if name != "step":
                    state[dead] = 0
        self.b_enc[dead] += self.sparsity.levels(self.encoder())[dead]  # so that it fires where it starts again
        self.since_fired[dead] = 0
        return sum(counts)

    # ---- the end

    @torch.no_grad()
    def reopen(self, *, widen: float, k: int | None) -> None:
        """Let features fire more widely from here on: shift their biases by `widen` (ending a floor) and change k."""
        self.sparsity.reopen(widen=widen, k=k)
        self.b_enc.add_(widen)

    def calibrate(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Set what the finished dictionary's activation function needs, on scaled inputs."""
        self.sparsity.calibrate(x, self.encoder())
