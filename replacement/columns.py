"""Products with gradients that lie targets last, [prefix, width, batch], and what makes them fast.

Knows how libraries multiply; nothing of layers, nor of the order in which a sweep goes through them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.linear import Entry
from replacement.linearised import LinearMLP
from replacement.sites import Norm

COLUMNS = 16  #: products of a multiple of so many columns are up to twice as fast as of other numbers
FEW = 24  #: targets up to which a product takes all positions as one matrix: libraries are slow at narrow ones


def width(targets: int) -> int:
    """How many columns are multiplied for so many targets: a few more, where products are faster then."""
    missing = -targets % COLUMNS
    return targets if missing > targets // 2 else targets + missing


def filled(entry: Entry) -> Entry:
    """The targets with some of no gradient after them, up to the columns that are multiplied."""
    missing = width(len(entry.positions)) - len(entry.positions)
    if not missing:
        return entry
    gradient = torch.cat([entry.gradient, entry.gradient.new_zeros(missing, entry.gradient.shape[1])])
    return entry._replace(
        gradient=gradient, positions=torch.cat([entry.positions, entry.positions[-1:].expand(missing)])
    )


def product(
    matrix: Float[Tensor, "m n"], x: Float[Tensor, "prefix n batch"], into: Float[Tensor, "prefix m batch"],
    *, add: bool = False,
) -> Float[Tensor, "prefix m batch"]:  # fmt: skip
    """`into = matrix x` at every position, or `into += matrix x`."""
    prefix, n, batch = x.shape
    if batch < FEW or x.dtype == torch.bfloat16:  # libraries have no fast narrow products in bfloat16 either
        flat = matrix @ x.permute(1, 0, 2).reshape(n, prefix * batch)
        found = flat.view(-1, prefix, batch).permute(1, 0, 2)
        return into.add_(found) if add else into.copy_(found)
    everywhere = matrix.expand(prefix, -1, -1)
    return into.baddbmm_(everywhere, x) if add else torch.bmm(everywhere, x, out=into)


def transpose_norm_at_all(
    norm: Norm, scale: Float[Tensor, "prefix 1"], gradient: Float[Tensor, "prefix d_model batch"]
) -> Float[Tensor, "prefix d_model batch"]:
    """`replacement.linear.transpose_norm` for targets last."""
    gradient = gradient * (norm.weight / scale)[:, :, None]
    return gradient - gradient.mean(1, keepdim=True) if norm.center else gradient


def through_mlp(mlp: LinearMLP, gradient: Float[Tensor, "prefix d_model batch"]) -> Tensor:
    """`LinearMLP.transpose` for targets last."""
    prefix, of = len(gradient), mlp.neurons
    hidden = torch.matmul(of.W_dec, gradient)
    through = torch.matmul(of.W_enc.T, hidden * mlp.c_in[:prefix, :, None])
    if mlp.c_gate is not None and of.W_gate is not None:
        through += torch.matmul(of.W_gate.T, hidden * mlp.c_gate[:prefix, :, None])
    return through
