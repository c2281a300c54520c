"""The end-to-end stage: the model with all its sites replaced learns the original's next-token distribution.

Low reconstruction error is not enough: answers hang on small directions, and errors add up over layers. k is held where
the dictionaries read, on the replaced model's stream, which may be simpler than the original's: on the latter more
features fire. Of k 8, atlas's transcoders have 7.6 to 8.2 there; SAEs of its stream, which read what others wrote, 7.4
to 15.8, the later the more.

Knows a model only as two functions of tokens; whoever has one provides them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from replacement.errors import InputError
from replacement.substitution import Replacement
from replacement.training.checkpoint import read_checkpoint, write_checkpoint
from replacement.training.coder import Coder
from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.missed import mean_square, unexplained
from replacement.training.parallel import Axis
from replacement.training.report import Clock, Listener, Record
from replacement.training.sharded_checkpoint import has_checkpoint
from replacement.training.source import Activations
from replacement.training.trainee import Trainee, l0
from replacement.training.watching import watched

_BESIDE = 10.0
"""Weight of the bridging term's reconstruction error. With a bridging weight of 1 atlas's transcoders lost 0.021, 0.015
and 0.004 of replacement score where this was 0, 1 and 5, by KL alone 0.017; at 10 they lose none (`benchmarks/
end_to_end.py`).
"""


class TokenBatch(NamedTuple):
    """Documents of one length, each with as many tokens that dictionaries stand at."""

    tokens: Int[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]  #: whether the *next* token is marked as an answer, and so always takes part


class ReplaceableModel(Protocol):
    """A frozen language model whose activations can be listened to and replaced."""

    def original(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "chosen vocab"], Activations]:
        """Logits at the positions in `where`, and activations of the tokens that dictionaries stand at, flattened."""
        ...

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"], replacement: Replacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with hooks replaced; gradients flow through."""
        ...


class _Forward:
    """Trainees in a model's place during one forward pass; collects the losses on the way."""

    def __init__(
        self,
        trainee: Trainee,
        original: Activations,
        *,
        config: EndToEndConfig,
        generator: torch.Generator,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        """kept: written hooks that keep the model's own values."""
        self.trainee, self.config, self.generator, self.kept = trainee, config, generator, kept
        self.original = {name: tensor.to(trainee.device) for name, tensor in original.items()}
        self.parts: dict[str, list[Tensor]] = {name: [] for name in trainee.written}
        self.gates: dict[str, list[Tensor]] = {name: [] for name in trainee.written}
        self.axis, whole = trainee.mesh.features, trainee.mesh.features.size > 1
        self.skips = {name: list[Tensor]() for name in trainee.written} if whole else self.parts  # all processes alike
        self.gate_skips = {name: list[Tensor]() for name in trainee.written} if whole else self.gates
        self.inputs: list[tuple[Coder, Tensor]] = []
        self.losses: list[Tensor] = []
        self.errors: dict[str, Tensor] = {}  # what was missed at the written hooks that the model has come by
        self.l0: list[Tensor] = []
        self.fvu: list[Tensor] = []
        self.shape: tuple[int, ...] = ()
        self._of = {coder.plan.reads[0]: coder for coder in trainee if len(coder.plan.reads) == 1}
        for coder in trainee:
            if len(coder.plan.reads) > 1:  # reads ahead of what it writes: the original's activations stand in
                self._run(coder, trainee.read(coder, self.original))

    def read(self, name: str, x: Float[Tensor, "batch pos width"]) -> None:
        self.shape = tuple(x.shape[:-1])
        if (coder := self._of.get(name)) is not None:
            self._run(coder, x.flatten(0, -2).to(self.trainee.device).float() * self.trainee.scale_of(name))

    def write(self, name: str) -> Float[Tensor, "batch pos width"] | None:
        trainee = self.trainee
        if name not in self.parts:
            return None
        out = trainee.bias(name)[None, None] + self._sum(self.parts, self.skips, name)
        wanted = self.original[name].float() * trainee.scale_of(name)
        loss, error = mean_square(wanted, [out])
        self.losses.append(self.config.reconstruction_weight * loss)
        if self.gates[name]:
            alone = trainee.bias(name).detach() + self._sum(self.gates, self.gate_skips, name)
            self.losses.append(self.config.reconstruction_weight * mean_square(wanted, [alone])[0])
        self.fvu.append(unexplained(error[:, -1], wanted, trainee.mesh.data))
        self.errors[name] = error[:, -1]
        if self.config.aux_weight:
            for coder, x in self.inputs:
                if coder.plan.writes[-1] == name:  # the model has come by all that it writes
                    missed = self.trainee.error_of(coder, self.errors)
                    self.losses.append(self.config.aux_weight * coder.dead_loss(x, missed, self.generator))
        if name in self.kept:
            return None
        return (out[:, -1] / trainee.scale_of(name)).view(*self.shape, -1)

    def _sum(self, parts: dict[str, list[Tensor]], skips: dict[str, list[Tensor]], name: str) -> Tensor:
        out = self.axis.add(torch.stack(parts[name]).sum(0))
        return out if skips is parts or not skips[name] else out + torch.stack(skips[name]).sum(0)

    def _run(self, coder: Coder, x: Tensor) -> None:
        if self.config.input_noise and coder.W_enc.requires_grad:
            x = x + self.config.input_noise * self._noise(x)
        one = coder(x, generator=self.generator, memory=self.config.threshold_memory)
        self.inputs.append((coder, x))
        self.l0.append(l0(one, self.trainee.mesh))
        self.losses.append(torch.as_tensor(one.penalty))
        one.add_to(self.parts, self.gates, coder.plan.writes)
        if coder.W_skip is not None:
            skip = torch.as_tensor(coder.skip(x))[:, None]
            self.skips[coder.plan.writes[0]].append(skip.expand_as(one.parts[:, :, 0]))
            if one.gate is not None:
                self.gate_skips[coder.plan.writes[0]].append(skip.detach())

    def _noise(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        data = self.trainee.mesh.data
        drawn = torch.randn(len(x) * data.size, x.shape[1], generator=self.generator).to(x.device)
        return drawn if data.size == 1 else drawn[data.sees(torch.arange(len(drawn), device=x.device))]


def train_end_to_end(
    model: ReplaceableModel,
    trainee: Trainee,
    batch: Callable[[int], TokenBatch],
    *,
    config: EndToEndConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    stop_after: int | None = None,
    listeners: Sequence[Listener] = (),
    show_progress: bool = True,
) -> None:
    """Train the dictionaries in place.

    `loss = kl_weight KL(original || replaced) + bridging_weight bridge
    + mean over sites of (reconstruction_weight |y - y'|^2 / d + penalty + aux_weight remedy)` and
    `bridge = KL(original || half replaced) + 10 mean over sites of |y - y''|^2 / d`, every KL averaged over tokens
    whose next token is an answer and a random share `other_share` of the others; y is the original's, y' is computed
    from the replaced model's own stream, y'' from the original's: y - y'' is what error nodes hold. Gated dictionaries
    add the same of what their gates alone write. A crosscoder reads layers beyond those that it writes, and so the
    original's activations.

    batch: documents by number; step n uses batch n. checkpoint, checkpoint_every, stop_after, listeners: as in `train`.
    Several processes, those of the trainee's mesh, share the documents of a batch.
    """
    mesh, layers = trainee.mesh, tuple(coder.layer for coder in trainee)
    require_fitting(config, trainee.config, layers, mesh.data.size)
    chosen = config.layers or layers
    trainee.requires_grad_(False)
    for coder in trainee:
        if coder.layer in chosen:
            coder.requires_grad_(True)
            coder.reopen(widen=config.widen, k=config.k)
    for name, bias in zip(trainee.written, trainee.b_dec, strict=True):
        bias.requires_grad_(any(coder.layer in chosen and name in _own(coder) for coder in trainee))
    optimizer = torch.optim.Adam(trainee.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    done = 0
    if checkpoint is not None and has_checkpoint(checkpoint):
        done, _ = read_checkpoint(checkpoint, trainee=trainee, optimizer=optimizer, config=config)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    clock = Clock()
    state: Any = {"trainee": trainee, "optimizer": optimizer, "config": config}
    with watched(
        "end to end",
        (done, last, config.steps),
        checkpoint=checkpoint,
        keep=lambda path, step: write_checkpoint(path, **state, step=step),
        every=checkpoint_every,
        listeners=listeners,
        show=show_progress,
        mesh=mesh,
    ) as after:
        for step in range(done, last):
            rise, fall = min(1.0, (step + 1) / max(1, config.warmup_steps)), 1 - step / config.steps
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rise * fall
            after(_update(model, trainee, batch(step), optimizer, step=step, config=config, clock=clock))
    trainee.use(mesh)


def require_fitting(config: EndToEndConfig, training: TrainingConfig, layers: Sequence[int], processes: int) -> None:
    """Raise `InputError` for what dictionaries of these layers, or processes that share a batch, do not fit."""
    experts = training.experts if training.encoder == "switch" else 1  # a token fires features of one only
    most = min(training.widths) // experts
    if not set(config.layers) <= set(layers) or (config.k or 0) > most:
        of_one = f", an expert {most}" if experts > 1 else ""
        raise InputError(
            f"train_end_to_end(layers={config.layers}, k={config.k}): the dictionaries read layers {tuple(layers)} and "
            f"have {training.n_features} features{of_one}"
        )
    if training.dead in ("none", "resample") and config.aux_weight not in (0.0, EndToEndConfig.aux_weight):
        raise InputError(
            f"train_end_to_end(aux_weight={config.aux_weight}): dead={training.dead!r} has no loss; leave it out"
        )
    if config.documents % processes:
        raise InputError(
            f"train_end_to_end(documents={config.documents}): {processes} processes share a batch; pass a multiple"
        )
    if training.sparsity != "batchtopk" and config.threshold_memory != EndToEndConfig.threshold_memory:
        raise InputError(
            f"train_end_to_end(threshold_memory={config.threshold_memory}): belongs to sparsity='batchtopk'; leave it "
            "out"
        )


def _update(
    model: ReplaceableModel,
    trainee: Trainee,
    batch: TokenBatch,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    config: EndToEndConfig,
    clock: Clock,
) -> Record:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    where = batch.answer | (torch.rand(batch.answer.shape, generator=generator) < config.other_share)
    data = trainee.mesh.data
    batch, where = TokenBatch(*(each[data.place :: data.size] for each in batch)), where[data.place :: data.size]
    with torch.no_grad():
        wanted, activations = model.original(batch.tokens, where)
    own = len(next(iter(activations.values())))
    trainee.use(trainee.mesh.with_runs(own // len(batch.tokens)))
    forward = _Forward(trainee, activations, config=config, generator=generator)
    kl = _divergence(model.replaced(batch.tokens, where, forward), wanted, data).to(trainee.device)
    total = config.kl_weight * kl + torch.stack(forward.losses).sum() / len(trainee.written)
    if config.bridging_weight:
        drawn = torch.rand(len(trainee.written), generator=generator) < 0.5
        kept = frozenset(name for name, keep in zip(trainee.written, drawn.tolist(), strict=True) if keep)
        once = dataclasses.replace(config, aux_weight=0.0)  # the dead have their loss already
        with trainee.unmoved():
            mixed = _Forward(trainee, activations, config=once, generator=generator, kept=kept)
            half = _divergence(model.replaced(batch.tokens, where, mixed), wanted, data).to(trainee.device)
        with trainee.unmoved():
            passed = trainee(activations, generator=generator, memory=config.threshold_memory, with_dead=False)
        total = total + config.bridging_weight * (half + _BESIDE * passed.reconstruction / len(trainee.written))
    value = data.average(total.detach())
    if not torch.isfinite(value):
        raise InputError(
            f"train_end_to_end: the loss is not finite at step {step + 1}; lower learning_rate and go on from the last "
            "checkpoint"
        )
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    trainee.settle_gradients(longest=1.0)
    optimizer.step()
    trainee.nudge()
    seen = own * data.size  # as many in each process
    seconds, speed = clock.tick(seen)
    return Record(
        stage="end to end",
        step=step + 1,
        steps=config.steps,
        tokens=(step + 1) * seen,
        loss=value.item(),
        fvu=torch.stack(forward.fvu).mean().item(),
        l0=torch.stack(forward.l0).mean().item(),
        dead=trainee.dead().item(),
        learning_rate=optimizer.param_groups[0]["lr"],
        seconds=seconds,
        tokens_per_second=speed,
        kl=data.average(kl.detach()).item(),
    )


def _own(coder: Coder) -> tuple[str, ...]:
    """The written hooks whose bias belongs to a coder: all of a crosscoder's, else that of its own layer."""
    return coder.plan.writes if len(coder.plan.reads) > 1 else coder.plan.writes[:1]


def _divergence(logits: Tensor, wanted: Tensor, data: Axis) -> Float[Tensor, ""]:
    """KL(wanted || logits), the mean over the chosen positions of all processes: of what each returns the mean."""
    logs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return nn.functional.kl_div(*logs, log_target=True, reduction="sum") / (max(1, data.count(len(logits))) / data.size)
