"""All dictionaries of one run while they are being trained: coders, biases of the written sites, scales, the loss.

Several dictionaries may write to one site (cross-layer transcoders); what they write there adds up. Knows nothing of
optimisers, streams or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from replacement.dictionary import LearnedDictionary
from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.training import kinds
from replacement.training.coder import Coder, Pass
from replacement.training.config import TrainingConfig
from replacement.training.export import Unscaled, dictionaries
from replacement.training.kinds import Plan
from replacement.training.missed import mean_square, unexplained
from replacement.training.parallel import ALONE, Mesh
from replacement.training.source import Activations


class Losses(NamedTuple):
    """The loss of a batch in its parts, and figures of the batch."""

    reconstruction: Float[Tensor, ""]  #: sum over written sites, mean over nested prefixes, in scaled units; the mean
    #: over processes that see other tokens is the batch's, as for the remedy's
    penalty: Tensor | float
    dead: Tensor | float  #: what the remedy for dead features adds, not yet weighted
    fvu: Float[Tensor, " n_written"]  #: of this batch, of all processes
    l0: Float[Tensor, " n_coders"]  #: of this batch, of all processes
    errors: dict[str, Float[Tensor, "tokens d_out"]]  #: what the whole dictionaries missed, scaled, constant


def require_spreading(config: TrainingConfig, mesh: Mesh) -> None:
    """Raise `InputError` where processes cannot share the features, or not evenly."""
    if any(n % mesh.features.size for n in config.widths):
        raise InputError(
            f"train(n_features={config.n_features}): {mesh.features.size} processes share the features; pass a multiple"
        )
    if config.encoder != "linear" and mesh.features.size > 1:
        raise InputError(
            f"train(encoder={config.encoder!r}): {mesh.features.size} processes share the features, and its "
            "features belong together; leave --feature-shards out, or pass encoder='linear'"
        )


class Trainee(nn.Module):
    """The dictionaries of one run, as far as this process holds them: of every dictionary all that has no feature
    axis, and the features that are its own.
    """

    scale: Tensor  # [n_sites], activations times it have norm sqrt(width) on average

    def __init__(
        self,
        planned: Sequence[Plan],
        sample: Activations,
        config: TrainingConfig,
        mesh: Mesh = ALONE,
        *,
        loaded: bool = False,
    ) -> None:
        """Start from a sample of activations, the same in all processes: scales and output means from it, features as
        `config.start` says.

        loaded: whether a checkpoint's tensors will take the place of all, so that none need be looked for. Raises
        `InputError` where the features cannot be spread, or not evenly.
        """
        super().__init__()
        require_spreading(config, mesh)
        self.planned, self.config, self.mesh = tuple(planned), config, mesh
        self.sites = kinds.sites(planned)
        self.written = tuple(dict.fromkeys(name for plan in planned for name in plan.writes))
        if missing := [name for name in self.sites if name not in sample]:
            raise InputError(f"train: the source has no {missing[0]}; it has {', '.join(sample)}")
        given = {name: sample[name].float() for name in self.sites}
        for name, tensor in given.items():
            if not all_finite(tensor):
                raise InputError(f"train: activations at {name} are not finite (NaN or inf) in the first buffer")
        lengths = torch.stack([tensor.shape[1] ** 0.5 / tensor.norm(dim=1).mean() for tensor in given.values()])
        if not torch.isfinite(lengths).all():
            raise InputError(f"train: activations at {self.sites[int(lengths.argmax())]} are all zero")
        self.register_buffer("scale", lengths)
        scaled = {name: given[name] * self.scale_of(name) for name in self.sites}
        self.b_dec = nn.ParameterList(nn.Parameter(scaled[name].mean(0)) for name in self.written)
        self.coders = nn.ModuleList(
            Coder(
                plan,
                torch.cat([scaled[name] for name in plan.reads], 1),
                torch.stack([scaled[name] for name in plan.writes], 1),
                config=replace(config.of(index, len(planned)), start="random" if loaded else config.start),
                shared=sum(plan.writes[-1] in other.writes for other in planned),
                mesh=mesh,
            )
            for index, plan in enumerate(planned)
        )

    def __iter__(self) -> Iterator[Coder]:
        """The dictionaries, in the order of their plans."""
        return (cast(Coder, coder) for coder in self.coders)

    def use(self, mesh: Mesh) -> None:
        """Work with these processes from here on, which hold the same features."""
        self.mesh = mesh
        for coder in self:
            coder.mesh = coder.sparsity.mesh = mesh

    @property
    def device(self) -> torch.device:
        """Where the dictionaries are trained."""
        return self.scale.device

    def scale_of(self, name: str) -> Float[Tensor, ""]:
        """The factor that brings a site's activations to scaled units."""
        return self.scale[self.sites.index(name)]

    def read(self, coder: Coder, activations: Activations) -> Float[Tensor, "tokens d_in"]:
        """A coder's scaled input."""
        return side_by_side(coder, {name: activations[name].float() * self.scale_of(name) for name in coder.plan.reads})

    def bias(self, name: str) -> Float[Tensor, " d_out"]:
        """The output bias of a written site, in scaled units."""
        return self.b_dec[self.written.index(name)]

    def scaled(self, activations: Activations, *, in_place: bool = False) -> Activations:
        """Activations of all sites in scaled units; in place: those given may be overwritten, which is faster."""
        multiplied = torch.Tensor.mul_ if in_place else torch.mul
        return {name: multiplied(activations[name].float(), self.scale_of(name)) for name in self.sites}

    def forward(
        self, activations: Activations, *, generator: torch.Generator, memory: float, with_dead: bool = True
    ) -> Losses:
        """The loss of a batch of unscaled activations, of which this process sees its share."""
        return self.losses(self.scaled(activations), generator=generator, memory=memory, with_dead=with_dead)

    def losses(
        self, scaled: Activations, *, generator: torch.Generator, memory: float, with_dead: bool = True
    ) -> Losses:
        """The loss of a batch of scaled activations.

        `sum over written sites of mean over prefixes of |y - y_p|^2 / d`, y with mean square about 1. with_dead:
        whether the remedy's loss is wanted.
        """
        own: dict[str, list[Tensor]] = {name: [] for name in self.written}  # what this process's features write
        own_gated: dict[str, list[Tensor]] = {name: [] for name in self.written}
        rest = {name: [self.bias(name)[None, None]] for name in self.written}
        inputs, passes = [], []
        for coder in self:
            x = side_by_side(coder, scaled)
            one = coder(x, generator=generator, memory=memory)
            inputs.append(x)
            passes.append(one)
            one.add_to(own, own_gated, coder.plan.writes)
            if coder.W_skip is not None:
                rest[coder.plan.writes[0]].append(torch.as_tensor(coder.skip(x))[:, None])
        losses = {name: mean_square(scaled[name], [*self._of_all(own[name]), *rest[name]]) for name in self.written}
        reconstruction = torch.stack([loss for loss, _ in losses.values()]).sum()
        if any(one.gate is not None for one in passes):
            alone = [
                mean_square(scaled[name], [*self._of_all(own_gated[name]), *(part.detach() for part in rest[name])])[0]
                for name in self.written
            ]
            reconstruction = reconstruction + torch.stack(alone).sum()
        errors = {name: error[:, -1] for name, (_, error) in losses.items()}
        return Losses(
            reconstruction,
            sum((one.penalty for one in passes), start=0.0),
            self._dead_loss(inputs, errors, generator) if with_dead else 0.0,
            torch.stack([unexplained(errors[name], scaled[name], self.mesh.data) for name in self.written]),
            torch.stack([l0(one, self.mesh) for one in passes]),
            errors,
        )

    def _of_all(self, own: list[Tensor]) -> list[Tensor]:
        """What adds up to what the features of all processes write at a site."""
        return own if self.mesh.features.size == 1 else [self.mesh.features.add(sum(own[1:], start=own[0]))]

    def error_of(self, coder: Coder, errors: dict[str, Tensor]) -> Float[Tensor, "tokens n_writes d_out"]:
        """What all dictionaries missed at the sites that a coder writes."""
        return torch.stack([errors[name] for name in coder.plan.writes], 1)

    def _dead_loss(self, inputs: list[Tensor], errors: dict[str, Tensor], generator: torch.Generator) -> Tensor | float:
        if not self.config.dead_weight:
            return 0.0
        losses = [
            coder.dead_loss(x, self.error_of(coder, errors), generator) for coder, x in zip(self, inputs, strict=True)
        ]
        return torch.stack(losses).sum()

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """A further pass over a batch that was seen already: running thresholds, penalty weights and firing counters
        are put back after it.
        """
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        try:
            yield
        finally:
            for name, buffer in self.named_buffers():
                if not torch.equal(buffer, before[name]):  # autograd holds those that stay, such as scales
                    buffer.copy_(before[name])

    @torch.no_grad()
    def calibrate(self, activations: Activations) -> None:
        """Set what the finished activation functions need, on a sample of unscaled activations, of which every process
        sees its share.
        """
        for coder in self:
            coder.calibrate(self.read(coder, activations))

    def unscaled(self, index: int) -> Unscaled:
        """A dictionary as it leaves training, by its number: of its features those that this process holds."""
        coder = cast(Coder, self.coders[index])
        per_part = coder.W_enc.shape[1] // len(coder.plan.reads)
        return Unscaled(
            coder,
            into=torch.stack([self.scale_of(name) for name in coder.plan.reads]).repeat_interleave(per_part),
            out=torch.stack([self.scale_of(name) for name in coder.plan.writes]),
            b_dec=torch.stack([self.bias(name).detach() for name in coder.plan.writes]),
        )

    def dictionaries(self) -> list[LearnedDictionary]:
        """The same maps on unscaled activations, in memory; see `export.dictionaries`."""
        return dictionaries(self)

    @staticmethod
    def is_spread(name: str, axes: int) -> bool:
        """Whether a tensor of the state, of so many axes, has one row for each feature that this process holds."""
        alike = name.endswith("W_skip") or ".scheme." in name
        return name.startswith("coders.") and not alike and axes > 0

    def dead(self) -> Float[Tensor, ""]:
        """Share of features, of all processes, that have not fired for long."""
        own = torch.cat([coder.is_dead() for coder in self]).float().mean()
        return self.mesh.features.average(own)

    def nudge(self) -> None:
        """After an optimiser's step: move every dictionary towards the L0 that is wanted of it."""
        for coder in self:
            coder.sparsity.nudge(coder.b_enc)

    def settle_gradients(self, *, longest: float) -> None:
        """Average gradients over processes that saw other tokens, and scale all down to a norm of at most `longest`."""
        held = [p for p in self.parameters() if p.grad is not None]
        for parameter in held:
            self.mesh.data.average_in_place(cast(Tensor, parameter.grad))
        if self.mesh.features.size == 1:
            norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in held])
        else:
            grads: tuple[list[Tensor], list[Tensor]] = ([], [])
            for name, parameter in self.named_parameters():
                if parameter.grad is not None:
                    grads[self.is_spread(name, parameter.ndim)].append(parameter.grad)
            alike, spread = (nn.utils.get_total_norm(some) ** 2 for some in grads)
            norm = (self.mesh.features.total(spread) + alike).sqrt()
        known = self.device.type == "cpu"  # a GPU would have to be waited for
        if not (known and norm <= longest):  # short ones would be multiplied by 1
            nn.utils.clip_grads_with_norm_(held, longest, norm)


def side_by_side(coder: Coder, activations: Activations) -> Float[Tensor, "tokens d_in"]:
    """Activations of the sites that a coder reads as one vector a token."""
    parts = [activations[name] for name in coder.plan.reads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def l0(one: Pass, mesh: Mesh) -> Float[Tensor, ""]:
    """Features that fire at a token, over the tokens and features of all processes."""
    return mesh.world.total((one.activations.detach() != 0).sum()) / (one.active.n_tokens * mesh.data.size)
