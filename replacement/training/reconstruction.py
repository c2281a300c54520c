"""The reconstruction stage: all dictionaries learn from one stream of activations.

Knows nothing of the model that the activations came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replacement.errors import InputError
from replacement.training.checkpoint import read_checkpoint, write_checkpoint
from replacement.training.config import CLUSTERED, START_TOKENS, TrainingConfig
from replacement.training.kinds import Plan
from replacement.training.parallel import ALONE, Mesh
from replacement.training.progress import waiting
from replacement.training.report import Clock, Listener, Record
from replacement.training.sharded_checkpoint import has_checkpoint
from replacement.training.source import Activations, ActivationSource, Stream
from replacement.training.trainee import Losses, Trainee, side_by_side
from replacement.training.watching import watched

_CALIBRATION_TOKENS = 4096
_WORDS = "filling the buffer", "filling the buffer, looking for clusters"
_CLIP = 1.0  # largest norm of the gradient


def train(
    source: ActivationSource,
    planned: Sequence[Plan],
    *,
    config: TrainingConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    listeners: Sequence[Listener] = (),
    show_progress: bool = True,
    mesh: Mesh = ALONE,
    device: torch.device | str = "cpu",
) -> Trainee:
    """Train the planned dictionaries.

    `loss = sum over written sites of mean over prefixes of |y - y_p|^2 / d + penalty + dead_weight * remedy`, in units
    where y has mean square about 1.

    source: activations, by number. planned: as from `kinds.plans`. checkpoint: file to go on from if it exists, and to
    write every `checkpoint_every` steps; a run that stopped, or was killed, and went on gives the same tensors as one
    that did not. stop_after: leave after this many steps in all. listeners: called with a `Record` after every step, in
    the first process. mesh: processes that train together, all of which call this; the batches, the losses and the
    dictionaries are those of one process, but for rounding, and a run may go on with another number of processes.
    device: where the dictionaries are trained; a run may go on on another one, then equal but for rounding.
    Raises `InputError` when the checkpoint belongs to other settings, when activations are not finite, or when the disk
    is full; the last checkpoint stays.
    """
    sizes: Any = {name: getattr(config, name) for name in ("buffer_bytes", "batch_tokens", "seed")}
    stream = Stream(source, **sizes, tokens=config.tokens_read, mesh=mesh, device=device)
    goes_on = checkpoint is not None and has_checkpoint(checkpoint)
    with waiting(_WORDS[config.start in CLUSTERED and not goes_on], show=show_progress and mesh.is_first):
        trainee = Trainee(planned, stream.sample(START_TOKENS), config, mesh, loaded=goes_on)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=config.learning_rate, betas=config.betas, fused=True)
    done = 0
    if checkpoint is not None and goes_on:
        done, stream.position = read_checkpoint(checkpoint, trainee=trainee, optimizer=optimizer, config=config)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    clock = Clock()
    state: Any = {"trainee": trainee, "optimizer": optimizer, "config": config}
    with watched(
        "reconstruction",
        (done, last, config.steps),
        checkpoint=checkpoint,
        keep=lambda path, step: write_checkpoint(path, **state, step=step, position=stream.position),
        every=checkpoint_every,
        listeners=listeners,
        show=show_progress,
        mesh=mesh,
    ) as after:
        for step in range(done, last):
            rate = config.learning_rate * learning_rate_factor(step, config)
            losses, total = _update(trainee, optimizer, stream, step=step, rate=rate, config=config)
            after(_record(losses, total, trainee, step=step + 1, rate=rate, clock=clock, config=config))
    rows = mesh.data.tokens_of(torch.arange(min(_CALIBRATION_TOKENS, config.batch_tokens)))
    trainee.calibrate({name: tensor[rows] for name, tensor in stream.peek().items()})
    return trainee


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at a step: up over `warmup_steps`, flat, then linearly to 2 % over the last
    `decay_fraction`.
    """
    left = (1 - step / config.steps) / config.decay_fraction if config.decay_fraction else 1.0
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * max(0.02, min(1.0, left))


def _update(
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    stream: Stream,
    *,
    step: int,
    rate: float,
    config: TrainingConfig,
) -> tuple[Losses, Tensor]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    batch = trainee.scaled(stream.next(), in_place=True)
    for coder in trainee:
        if coder.W_skip is not None:
            coder.W_skip.requires_grad_(step >= config.skip_starts * config.steps)
    losses = trainee.losses(batch, generator=generator, memory=config.threshold_memory)
    total = losses.reconstruction + losses.penalty + config.dead_weight * losses.dead
    value = trainee.mesh.data.average(total.detach())
    if not torch.isfinite(value):
        _explain(batch, step, trainee.mesh)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    trainee.settle_gradients(longest=_CLIP)
    optimizer.step()
    trainee.nudge()
    if config.dead == "resample" and _resamples(step, config):
        for coder in trainee:
            error = trainee.error_of(coder, losses.errors)
            coder.resample(side_by_side(coder, batch), error, optimizer=optimizer, generator=generator)
    return losses, value


def _resamples(step: int, config: TrainingConfig) -> bool:
    """Whether features start again after this step: every `dead_after` tokens, until the learning rate falls."""
    every = 1 + config.dead_after // config.batch_tokens
    return (step + 1) % every == 0 and step < config.steps * (1 - config.decay_fraction)


def _explain(batch: Activations, step: int, mesh: Mesh) -> None:
    for name, tensor in batch.items():
        if mesh.world.any(~torch.isfinite(tensor).all()):
            raise InputError(
                f"train: activations at {name} are not finite (NaN or inf) at step {step + 1}; "
                "check the model and the data, then go on from the last checkpoint"
            )
    raise InputError(
        f"train: the loss is not finite at step {step + 1}; lower learning_rate and go on from the last checkpoint"
    )


def _record(
    losses: Losses, total: Tensor, trainee: Trainee, *, step: int, rate: float, clock: Clock, config: TrainingConfig
) -> Record:
    seconds, speed = clock.tick(config.batch_tokens)
    return Record(
        stage="reconstruction",
        step=step,
        steps=config.steps,
        tokens=step * config.batch_tokens,
        loss=total.item(),
        fvu=losses.fvu.mean().item(),
        l0=losses.l0.mean().item(),
        dead=trainee.dead().item(),
        learning_rate=rate,
        seconds=seconds,
        tokens_per_second=speed,
    )
