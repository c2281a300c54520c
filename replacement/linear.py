"""The linear path of a language model on one prompt, forwards and transposed.

With attention patterns and norm scales frozen at their values on the prompt, what flows from any write to any later
read is a linear map: norms, value and output maps of attention, skip connections of dictionaries. This file applies
that map (`attention`, `read`, `write`) and its transpose (`sweep`) as plain matrix products: no hooks, no autograd. It
knows nothing of features.

Places in the residual stream are called by block: `pre` (before attention), `mid` (after attention, where the MLP
reads; in a parallel block the same as `pre`), `post` (after the MLP's write).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.sites import BlockPass, BlockWeights, ForwardPass, ModelWeights, Norm


class Skip(NamedTuple):
    """A dictionary's skip connection: `x -> x W^T` from a read site to a write site of one block."""

    W_skip: Float[Tensor, "d_out d_in"]
    read: str
    write: str


class Gradients(NamedTuple):
    """Gradients on the way down, at one block."""

    layer: int
    post: Float[Tensor, "batch prefix d_model"]  # at the block's output, where the MLP's write is added
    attention: Float[Tensor, "batch prefix d_model"]  # where attention's write is added


def apply_norm(norm: Norm, scale: Float[Tensor, "... pos 1"], x: Tensor, *, bias: bool = True) -> Tensor:
    """The norm with its scale frozen."""
    x = x - x.mean(-1, keepdim=True) if norm.center else x
    x = x / scale * norm.weight
    return x if norm.bias is None or not bias else x + norm.bias


def transpose_norm(norm: Norm, scale: Float[Tensor, "... pos 1"], gradient: Tensor) -> Tensor:
    """The transpose of the frozen norm's linear part."""
    gradient = gradient * norm.weight / scale
    return gradient - gradient.mean(-1, keepdim=True) if norm.center else gradient


class LinearPath:
    """The frozen linear maps of one prompt."""

    def __init__(self, weights: ModelWeights, forward: ForwardPass, skips: dict[int, Skip]) -> None:
        self.weights, self.forward, self.skips = weights, forward, skips
        self.n_layers = len(weights.blocks)
        self.n_positions = forward.tokens.shape[0]

    def attention_norm(self, layer: int) -> tuple[Norm, Float[Tensor, "pos 1"]] | None:
        """The norm between attention's output and the stream, with its scale; None where the family has none."""
        norm, scale = self.weights.blocks[layer].ln1_post, self.forward.blocks[layer].ln1_post_scale
        return None if norm is None or scale is None else (norm, scale)

    def write_norm(self, layer: int, site: str) -> tuple[Norm, Float[Tensor, "pos 1"]] | None:
        """The norm between a write site and the stream, with its scale; None where there is none."""
        norm, scale = self.weights.blocks[layer].ln2_post, self.forward.blocks[layer].ln2_post_scale
        return None if site == "hook_mlp_out" or norm is None or scale is None else (norm, scale)

    # ---- forwards

    def attention(self, layer: int, residual: Float[Tensor, "pos d_model"], *, bias: bool = True) -> Tensor:
        """What attention adds to the stream at `layer`, its patterns frozen."""
        weights, block = self.weights.blocks[layer], self.forward.blocks[layer]
        x = apply_norm(weights.ln1, block.ln1_scale, residual, bias=bias)
        values = torch.einsum("pd,gde->gpe", x, weights.W_V)
        if bias and weights.b_V is not None:
            values = values + weights.b_V[:, None]
        groups = weights.W_O.shape[0] // weights.W_V.shape[0]
        mixed = torch.matmul(block.pattern.unflatten(0, (-1, groups)), values[:, None]).flatten(0, 1)
        out = torch.einsum("hpe,hed->pd", mixed, weights.W_O)
        if bias and weights.b_O is not None:
            out = out + weights.b_O
        post_norm = self.attention_norm(layer)
        return out if post_norm is None else apply_norm(*post_norm, out, bias=bias)

    def read(self, layer: int, site: str, mid: Float[Tensor, "pos d_model"], *, bias: bool = True) -> Tensor:
        """The activations at a read site, from the residual stream where the MLP of `layer` reads."""
        if site == "hook_resid_mid":
            return mid
        weights, scale = self.weights.blocks[layer], self.forward.blocks[layer].ln2_scale
        if site == "mlp.hook_in":
            return apply_norm(weights.ln2, scale, mid, bias=bias)
        return (mid - mid.mean(-1, keepdim=True) if weights.ln2.center else mid) / scale

    def write(self, layer: int, site: str, value: Float[Tensor, "pos d_model"], *, bias: bool = True) -> Tensor:
        """What a value at a write site adds to the residual stream."""
        post_norm = self.write_norm(layer, site)
        return value if post_norm is None else apply_norm(*post_norm, value, bias=bias)

    def middle(self, layer: int, residual: Float[Tensor, "pos d_model"], attention: Tensor) -> Tensor:
        """The residual stream where the MLP of `layer` reads."""
        return residual if self.weights.parallel else residual + attention

    def constants(self, layer: int) -> tuple[Float[Tensor, "pos d_model"], Float[Tensor, "pos d_model"]]:
        """What biases alone add to the stream at `layer`: through attention, and through skip and post-norm."""
        zero = torch.zeros_like(self.forward.embedding)
        attention = self.attention(layer, zero)
        skip = self.skips.get(layer)
        if skip is None:
            return attention, zero
        mlp = self.read(layer, skip.read, zero) @ skip.W_skip.T
        return attention, self.write(layer, skip.write, mlp, bias=False)

    # ---- transposed

    def transpose_read(self, layer: int, site: str, gradient: Tensor, positions: Int[Tensor, " n"] | slice) -> Tensor:
        """From gradients at a read site to gradients at `mid`; leading axes (n, or batch and positions) as given."""
        if site == "hook_resid_mid":
            return gradient
        norm, scale = self.weights.blocks[layer].ln2, self.forward.blocks[layer].ln2_scale[positions]
        if site == "mlp.hook_in":
            return transpose_norm(norm, scale, gradient)
        gradient = gradient / scale
        return gradient - gradient.mean(-1, keepdim=True) if norm.center else gradient

    def transpose_write(self, layer: int, site: str, gradient: Float[Tensor, "batch pos d_model"]) -> Tensor:
        """From gradients at `post` to gradients at a write site."""
        if (post_norm := self.write_norm(layer, site)) is None:
            return gradient
        norm, scale = post_norm
        return transpose_norm(norm, scale[: gradient.shape[1]], gradient)

    def transpose_final(self, directions: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Tensor:
        """From directions at the last norm's output to gradients at the last block's `post`."""
        return transpose_norm(self.weights.ln_final, self.forward.ln_final_scale[positions], directions)

    def sweep(
        self, gradient: Float[Tensor, "batch d_model"], positions: Int[Tensor, " batch"], layer: int
    ) -> Iterator[Gradients]:
        """Pull gradients back through the network, block by block, from block `layer - 1` down to the embeddings.

        `gradient` lies at `mid` of block `layer`, one position a row; `layer` may be the number of layers, then it
        lies at the last block's `post`. The last item, of layer -1, holds the gradient at the embeddings as `post`.
        Only the causal prefix of positions is carried: `prefix` is the largest position plus one.
        """
        post = self._step_into(gradient, positions, layer)
        for below in range(layer - 1, -1, -1):
            mid = self._skip_step(below, post)
            attention = post if self.weights.parallel else mid
            yield Gradients(below, post, attention)
            post = mid + self._attention_step(below, attention)
        yield Gradients(-1, post, post)

    def _step_into(self, gradient: Tensor, positions: Tensor, layer: int) -> Float[Tensor, "batch prefix d_model"]:
        """From single positions at `mid` of `layer` to `pre`: attention's step costs one query position, not all."""
        prefix = int(positions.max()) + 1
        full = gradient.new_zeros(gradient.shape[0], prefix, gradient.shape[1])
        if layer < self.n_layers and not self.weights.parallel:
            weights, block = self.weights.blocks[layer], self.forward.blocks[layer]
            out = gradient
            if (post_norm := self.attention_norm(layer)) is not None:
                out = transpose_norm(post_norm[0], post_norm[1][positions], out)
            heads = torch.einsum("bd,hed->bhe", out, weights.W_O)
            groups = weights.W_O.shape[0] // weights.W_V.shape[0]
            pattern = block.pattern[:, positions, :prefix].unflatten(0, (-1, groups))  # [kv, group, batch, key]
            mixed = torch.einsum("gjbk,bgje->gbke", pattern, heads.unflatten(1, (-1, groups)))
            full = _value_transpose(weights, block, mixed)
        rows = torch.arange(len(positions), device=positions.device)
        full[rows, positions] += gradient
        return full

    def _skip_step(self, layer: int, post: Float[Tensor, "batch prefix d_model"]) -> Tensor:
        """From `post` to `mid` (in a parallel block, to `pre` without attention's part)."""
        if layer not in self.skips:
            return post
        skip = self.skips[layer]
        gradient = self.transpose_write(layer, skip.write, post) @ skip.W_skip
        return post + self.transpose_read(layer, skip.read, gradient, slice(0, post.shape[1]))

    def _attention_step(self, layer: int, out: Float[Tensor, "batch prefix d_model"]) -> Tensor:
        """From what attention adds to `pre`."""
        weights, block = self.weights.blocks[layer], self.forward.blocks[layer]
        batch, prefix, _ = out.shape
        if (post_norm := self.attention_norm(layer)) is not None:
            out = transpose_norm(post_norm[0], post_norm[1][:prefix], out)
        kv_heads, _, d_head = weights.W_V.shape
        n_heads = weights.W_O.shape[0]
        heads = (out.reshape(batch * prefix, -1) @ weights.W_O.flatten(0, 1).T).view(batch, prefix, n_heads, d_head)
        heads = heads.permute(2, 1, 0, 3).reshape(n_heads, prefix, batch * d_head)
        mixed = torch.bmm(block.pattern[:, :prefix, :prefix].transpose(1, 2), heads)
        mixed = mixed.unflatten(0, (kv_heads, -1)).sum(1).view(kv_heads, prefix, batch, d_head).transpose(1, 2)
        return _value_transpose(weights, block, mixed)


def _value_transpose(
    weights: BlockWeights, block: BlockPass, mixed: Float[Tensor, "kv_heads batch key d_head"]
) -> Float[Tensor, "batch key d_model"]:
    """From gradients at the value vectors to gradients at `pre`."""
    kv_heads, batch, prefix, d_head = mixed.shape
    flat = mixed.permute(1, 2, 0, 3).reshape(batch * prefix, kv_heads * d_head)
    gradient = flat @ weights.W_V.transpose(1, 2).reshape(kv_heads * d_head, -1)
    return transpose_norm(weights.ln1, block.ln1_scale[:prefix], gradient.view(batch, prefix, -1))
