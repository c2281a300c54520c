"""What each source contributes to each target of a local model: one row of an attribution graph per target.

`row[t, s] = w_t^T J(t <- s) v_s` with v_s the vector that source s writes and J the frozen linear map (Ameisen et al.
2025, "Circuit Tracing", section on attribution graphs; Dunefsky et al. 2024). Two engines give the same rows:
`linear`, an explicit transposed sweep, and `autograd`, `torch.autograd` on the hooked language model, the reference.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.linear import Gradients
from replacement.local import LocalModel, Targets
from replacement.sites import Norm


class Contributions(NamedTuple):
    """Signed contributions of all sources to a batch of targets; along a row they sum to the target's value."""

    features: Float[Tensor, "n n_features"]
    errors: Float[Tensor, "n n_layers pos"]
    embeddings: Float[Tensor, "n pos"]
    bias: Float[Tensor, " n"]  # all constants: b_dec, attention and norm biases, position embeddings, the target's own
    bos: Float[Tensor, " n"]  # what the MLPs write at position 0, zero where position 0 is traced


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
        like.new_zeros(n, local.n_layers, local.n_positions),
        like.new_zeros(n, local.n_positions),
        like.new_zeros(n),
        like.new_zeros(n),
    )


class LinearEngine:
    """Rows by a transposed sweep of matrix products from the targets' layer down; no autograd, no hooks."""

    def __init__(self, local: LocalModel) -> None:
        self.local = local

    def rows(self, targets: Targets) -> Contributions:
        local, path = self.local, self.local.path
        gradient, own_bias = read_gradient(local, targets)
        result = zero_contributions(local, len(targets.rows))
        result.bias.add_(own_bias)
        if targets.layer < local.n_layers and not path.weights.parallel:
            attention, _ = local.constant_stream[targets.layer]
            result.bias.add_((gradient * attention[targets.positions]).sum(-1))
        for gradients in path.sweep(gradient, targets.positions, targets.layer):
            if gradients.layer >= 0:
                self._add_block(gradients, result)
            else:
                self._add_embeddings(gradients.post, result)
        return result

    def _add_block(self, gradients: Gradients, result: Contributions) -> None:
        local, (layer, post, attention) = self.local, gradients
        prefix = post.shape[1]
        at_write = local.path.transpose_write(layer, local.write_site(layer), post)
        attention_constant, mlp_constant = local.constant_stream[layer]
        result.errors[:, layer, :prefix] = torch.einsum("bpd,pd->bp", at_write, local.errors[layer, :prefix])
        result.bias.add_(torch.einsum("bpd,pd->b", post, mlp_constant[:prefix]))
        result.bias.add_(torch.einsum("bpd,pd->b", attention, attention_constant[:prefix]))
        result.bos.add_(at_write[:, 0] @ local.bos[layer])
        writes = local.writes[layer]
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


def read_gradient(local: LocalModel, targets: Targets) -> tuple[Float[Tensor, "n d_model"], Float[Tensor, " n"]]:
    """The targets' gradients at the residual stream where they read, and the part of their value that no source
    moves."""
    path, own_bias = local.path, targets.biases
    norm: Norm | None = None
    if targets.layer == local.n_layers:
        norm = path.weights.ln_final
        gradient = path.transpose_final(targets.rows, targets.positions)
    else:
        norm = path.weights.blocks[targets.layer].ln2 if targets.site == "mlp.hook_in" else None
        gradient = path.transpose_read(targets.layer, targets.site, targets.rows, targets.positions)
    if norm is not None and norm.bias is not None:
        own_bias = own_bias + targets.rows @ norm.bias
    return gradient, own_bias
