"""What dictionaries miss at a site: the mean square that they learn from, and the share that a log shows.

As few passes over whole batches of activations as there can be: on a CPU each costs as much as a tenth of an encoder's
product. Knows nothing of dictionaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from replacement.training.parallel import Axis


def mean_square(
    wanted: Float[Tensor, "tokens d_out"], written: Sequence[Float[Tensor, ...]]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens prefixes d_out"]]:
    """The mean square of `wanted - sum of written`, and that error itself, which is held fixed.

    written: parts of `[tokens, prefixes, d_out]`, as the first is, or broadcast to it; gradients flow to them, and none
    to `wanted`.
    """
    assert written[0].shape == torch.broadcast_shapes(*(part.shape for part in written)) and not wanted.requires_grad
    loss, error = _MeanSquare.apply(wanted, *written)
    return loss, error


class _MeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: Tensor, *written: Tensor) -> tuple[Tensor, Tensor]:
        error = wanted[:, None] - written[0]
        for part in written[1:]:
            error -= part
        ctx.save_for_backward(error)
        ctx.shapes = [part.shape for part in written]
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)  # or zeros of the error's size would be made in every backward pass
        return total_square(error) / max(1, error.numel()), error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (error,) = ctx.saved_tensors
        whole = error * (grad * (-2 / max(1, error.numel())))
        needed = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return None, *(whole.sum_to_size(shape) if wants else None for shape, wants in needed)


def unexplained(
    error: Float[Tensor, "tokens d_out"], wanted: Float[Tensor, "tokens d_out"], data: Axis
) -> Float[Tensor, ""]:
    """FVU over the tokens of all processes: `|error|^2 / |wanted - mean|^2`."""
    spread = total_square(wanted - data.average(wanted.mean(0)))
    return data.total(total_square(error)) / data.total(spread).clamp_min(1e-12)


def total_square(x: Float[Tensor, "*axes d"]) -> Float[Tensor, ""]:
    """The sum of all squares: row by row, without another tensor of that size."""
    return x.norm(dim=-1).square().sum()
