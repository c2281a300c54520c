"""The end-to-end stage: the model with all MLPs replaced learns the original's next-token distribution.

Low reconstruction error is not enough: answers hang on small directions, and errors add up over layers. Knows a model
only as two functions of tokens; whoever has one provides them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from replacement.training.checkpoint import read_checkpoint, write_checkpoint
from replacement.training.config import EndToEndConfig
from replacement.training.layer import TrainedLayer
from replacement.training.progress import progress_bar
from replacement.training.source import Activations

MLPReplacement = Callable[[int, Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_out"]]


class TokenBatch(NamedTuple):
    """Documents of one length."""

    tokens: Int[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]  #: whether the *next* token is an answer


class ReplaceableModel(Protocol):
    """A frozen language model whose MLPs can be swapped for functions."""

    def original(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "chosen vocab"], Activations]:
        """Logits at the positions in `where`, and every MLP's input and output with all tokens flattened."""
        ...

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], where: Bool[Tensor, "batch pos"], mlp: MLPReplacement
    ) -> Float[Tensor, "chosen vocab"]:
        """The same logits with the MLP of layer l computed as `mlp(l, input)`; gradients flow through."""
        ...


def train_end_to_end(
    model: ReplaceableModel,
    layers: nn.ModuleList,
    batch: Callable[[int], TokenBatch],
    *,
    config: EndToEndConfig,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    stop_after: int | None = None,
    show_progress: bool = True,
) -> None:
    """Train the layers in place.

    `loss = kl_weight KL(original || replaced) + reconstruction_weight mean_l |y_l - y'_l|^2 / d + aux_weight AuxK`,
    the KL averaged over tokens whose next token is an answer and a random share `other_share` of the others; y'_l is
    computed from the replaced model's own stream, y_l is the original's MLP output.

    batch: documents by number; step n uses batch n. checkpoint, checkpoint_every, stop_after: as in `train`.
    """
    chosen = config.layers or tuple(range(len(layers)))
    for index, layer in enumerate(layers):
        layer.requires_grad_(index in chosen)
        if index in chosen:
            cast(TrainedLayer, layer).reopen(widen=config.widen, k=config.k)
    optimizer = torch.optim.Adam(layers.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=True)
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = read_checkpoint(checkpoint, layers=layers, optimizer=optimizer, config=config)
    last = config.steps if stop_after is None else min(stop_after, config.steps)
    with progress_bar(show=show_progress) as bar:
        task = bar.add_task("end to end", total=config.steps, completed=done, figure="")
        for step in range(done, last):
            rise, fall = min(1.0, (step + 1) / max(1, config.warmup_steps)), 1 - step / config.steps
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * rise * fall
            kl, rest = _losses(model, layers, batch(step), step=step, config=config)
            optimizer.zero_grad(set_to_none=True)
            (config.kl_weight * kl + rest).backward()
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == last):
                write_checkpoint(checkpoint, layers=layers, optimizer=optimizer, step=step + 1, config=config)
            bar.update(task, advance=1, figure=f"KL {kl.item():.4f} rest {rest.item():.4f}")


def _losses(
    model: ReplaceableModel, layers: nn.ModuleList, batch: TokenBatch, *, step: int, config: EndToEndConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    where = batch.answer | (torch.rand(batch.answer.shape, generator=generator) < config.other_share)
    with torch.no_grad():
        wanted, activations = model.original(batch.tokens, where)
    rest: list[Tensor] = []

    def mlp(index: int, x: Tensor) -> Tensor:
        layer = cast(TrainedLayer, layers[index])
        scaled = x.reshape(-1, x.shape[-1]) * layer.input_scale
        if config.input_noise and layer.W_enc.requires_grad:
            scaled = scaled + config.input_noise * torch.randn(scaled.shape, generator=generator)
        result = layer(scaled, generator=generator, memory=config.threshold_memory)
        error = activations.outputs[index].unsqueeze(1) * layer.output_scale - result.outputs
        rest.append(config.reconstruction_weight * error.pow(2).mean())
        if config.aux_weight:
            rest.append(config.aux_weight * layer.aux_loss(scaled, error[:, -1], generator))
        return (result.outputs[:, -1] / layer.output_scale).view(*x.shape[:-1], -1)

    logits = model.replaced(batch.tokens, where, mlp)
    logs = logits.float().log_softmax(-1), wanted.float().log_softmax(-1)
    divergence = nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    return divergence, torch.stack(rest).sum() / len(layers)
