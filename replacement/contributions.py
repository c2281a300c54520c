"""What each source contributes to each target of a local model: one row of an attribution graph per target.

`row[t, s] = w_t^T J(t <- s) v_s` with v_s the vector that source s writes and J the frozen linear map (Ameisen et al.
2025, "Circuit Tracing", section on attribution graphs; Dunefsky et al. 2024). Two engines give the same rows:
`linear`, an explicit transposed sweep, and `autograd`, `torch.autograd` on the hooked language model, the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.linear import Entry, Gradients
from replacement.local import LocalModel, Targets


class Contributions(NamedTuple):
    """Signed contributions of all sources to a batch of targets; along a row they sum to the target's value."""

    features: Float[Tensor, "n n_features"]
    errors: Float[Tensor, "n slots pos"]
    embeddings: Float[Tensor, "n pos"]
    bias: Float[Tensor, " n"]  # all constants: b_dec, attention and norm biases, position embeddings, the target's own
    bos: Float[Tensor, " n"]  # what is written at position 0, zero where position 0 is traced


@runtime_checkable
class Engine(Protocol):
    """Computes rows of contributions for targets of one local model."""

    def rows(self, targets: Targets) -> Contributions:
        """The contributions of every source to each target."""
        ...


def zero_contributions(local: LocalModel, n: int) -> Contributions:
    """Rows of zeros, to be added to."""
    like = local.forward.embedding
    return Contributions(
        like.new_zeros(n, len(local.features.layer)),
        like.new_zeros(n, len(local.slots), local.n_positions),
        like.new_zeros(n, local.n_positions),
        like.new_zeros(n),
        like.new_zeros(n),
    )


def total_rows(engine: Engine, reads: Sequence[Targets]) -> Contributions:
    """Rows of targets that read several sites: the sum of the rows of each."""
    parts = [engine.rows(targets) for targets in reads]
    return parts[0] if len(parts) == 1 else Contributions(*(sum(of) for of in zip(*parts, strict=True)))


class LinearEngine:
    """Rows by a transposed sweep of matrix products from the targets' layer down; no autograd, no hooks."""

    def __init__(self, local: LocalModel) -> None:
        self.local = local
        self.slots = {slot: index for index, slot in enumerate(local.slots)}

    def rows(self, targets: Targets) -> Contributions:
        entry, own_bias = enter(self.local, targets)
        result = zero_contributions(self.local, len(targets.rows))
        result.bias.add_(own_bias)
        for gradients in self.local.path.sweep(entry):
            if gradients.slot is None:
                self._add_embeddings(gradients.stream, result)
            else:
                self._add_slot(gradients, result)
        return result

    def _add_slot(self, gradients: Gradients, result: Contributions) -> None:
        local, (slot, stream) = self.local, gradients
        assert slot is not None
        prefix = stream.shape[1]
        if (constant := local.constants.get(slot)) is not None:
            result.bias.add_(torch.einsum("bpd,pd->b", stream, constant[:prefix]))
        if (index := self.slots.get(slot)) is None:
            return
        at_write = local.path.transpose_write(slot.layer, local.write_site(slot), stream)
        result.errors[:, index, :prefix] = torch.einsum("bpd,pd->bp", at_write, local.errors[index, :prefix])
        result.bos.add_(at_write[:, 0] @ local.bos[index])
        if (writes := local.writes.get(slot)) is None:
            return
        counts = torch.bincount(writes.position, minlength=local.n_positions)[:prefix].tolist()
        if not (total := sum(counts)):
            return
        products, start = [], 0
        for position, count in enumerate(counts):
            if count:
                products.append(at_write[:, position] @ writes.vectors[start : start + count].T)
                start += count
        result.features.index_add_(1, writes.source[:total], torch.cat(products, 1))

    def _add_embeddings(self, gradient: Float[Tensor, "batch prefix d_model"], result: Contributions) -> None:
        forward, prefix = self.local.forward, gradient.shape[1]
        result.embeddings[:, :prefix] = torch.einsum("bpd,pd->bp", gradient, forward.embedding[:prefix])
        if forward.position_embedding is not None:
            result.bias.add_(torch.einsum("bpd,pd->b", gradient, forward.position_embedding[:prefix]))


def enter(local: LocalModel, targets: Targets) -> tuple[Entry, Float[Tensor, " n"]]:
    """Where the targets' gradients enter the residual stream, and the part of their value that no source moves."""
    path = local.path
    if targets.layer == local.n_layers:
        bias = path.weights.ln_final.bias
        own_bias = targets.biases if bias is None else targets.biases + targets.rows @ bias
        return path.final_entry(targets.rows, targets.positions), own_bias
    constant = local.read_constant(targets.layer, targets.site, written=targets.written)[targets.positions]
    entry = path.entry(targets.layer, targets.site, targets.rows, targets.positions, written=targets.written)
    return entry, targets.biases + (targets.rows * constant).sum(-1)
