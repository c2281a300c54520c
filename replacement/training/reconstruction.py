"""The reconstruction stage: all layers' transcoders learn their MLPs from one stream of activations.

BatchTopK (Bussmann et al. 2024) with the choice made by a running threshold, AuxK for dead features (Gao et al. 2024),
nested prefixes (Bussmann et al. 2025) when asked for. Knows nothing of the model that the activations came from.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from replacement.training.checkpoint import read_checkpoint, write_checkpoint
from replacement.training.config import TrainingConfig
from replacement.training.layer import TrainedLayer
from replacement.training.progress import progress_bar
from replacement.training.source import Activations, ActivationSource, ShuffledBlocks

_CALIBRATION_TOKENS, _START_TOKENS = 4096, 24576


def train(
    source: ActivationSource,
    *,
    config: TrainingConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 200,
    stop_after: int | None = None,
    show_progress: bool = True,
) -> nn.ModuleList:
    """Train one `TrainedLayer` per layer of the source.

    `loss = sum over layers of mean over prefixes of |y - y_p|^2 / d + aux_weight AuxK`, in units where y has mean
    square about 1.

    source: activations, by number. checkpoint: file to go on from if it exists, and to write every `checkpoint_every`
    steps; a run that stopped and went on gives the same tensors as one that did not. stop_after: leave after this many
    steps in all. Raises `InputError` when the checkpoint belongs to other settings.
    """
    blocks = ShuffledBlocks(
        source, block_batches=config.block_batches, batch_tokens=config.batch_tokens, seed=config.seed
    )
    first = blocks.first_tokens(_START_TOKENS)
    n_layers = len(first.inputs)
    layers = nn.ModuleList(
        TrainedLayer(x.float(), y.float(), config=config, layer=layer, n_layers=n_layers)
        for layer, (x, y) in enumerate(zip(first.inputs, first.outputs, strict=True))
    )
    parameters = list(layers.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = read_checkpoint(checkpoint, layers=layers, optimizer=optimizer, config=config)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    with progress_bar(show=show_progress) as bar:
        task = bar.add_task("reconstruction", total=config.steps, completed=done, figure="")
        for step in range(done, last):
            loss = _step(layers, blocks.batch(step), step=step, config=config)
            _set_learning_rate(optimizer, config.learning_rate * learning_rate_factor(step, config))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == last):
                write_checkpoint(checkpoint, layers=layers, optimizer=optimizer, step=step + 1, config=config)
            bar.update(task, advance=1, figure=f"loss {loss.item() / n_layers:.4f}")
    sample = blocks.batch(last).inputs[:, :_CALIBRATION_TOKENS]
    for layer, x in zip(layers, sample, strict=True):
        cast(TrainedLayer, layer).calibrate(x.float())
    return layers


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at a step: up over `warmup_steps`, flat, then linearly to 2 % over the last
    `decay_fraction`.
    """
    left = (1 - step / config.steps) / config.decay_fraction if config.decay_fraction else 1.0
    return min(1.0, (step + 1) / max(1, config.warmup_steps)) * max(0.02, min(1.0, left))


def _step(layers: nn.ModuleList, batch: Activations, *, step: int, config: TrainingConfig) -> Float[Tensor, ""]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    loss = torch.zeros(())
    for module, inputs, outputs in zip(layers, batch.inputs, batch.outputs, strict=True):
        layer = cast(TrainedLayer, module)
        x, y = inputs.float() * layer.input_scale, outputs.float() * layer.output_scale
        result = layer(x, generator=generator, memory=config.threshold_memory)
        error = y.unsqueeze(1) - result.outputs
        loss = loss + error.pow(2).mean()
        if config.aux_weight:
            loss = loss + config.aux_weight * layer.aux_loss(x, error[:, -1], generator)
    return loss


def _set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
