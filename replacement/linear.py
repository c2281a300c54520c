"""The linear path of a language model on one prompt, forwards and transposed.

With attention patterns and norm scales frozen at their values on the prompt, what flows from any write to any later
read is a linear map: norms, value and output maps of attention, skip connections of dictionaries, linearised MLPs. This
file applies that map (`attention`, `read`, `write`) as plain matrix products, and its transpose at single positions;
`replacement.sweep` pulls gradients back through all of it. No hooks, and no autograd but where attention's full
gradient is asked for. It knows nothing of features.

The residual stream is called by block: `pre` (before attention), `mid` (after attention, where the MLP reads; in a
parallel block the same as `pre`), `post` (after the MLP's write).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.linearised import AttentionGradient, LinearMLP
from replacement.sites import ForwardPass, ModelWeights, Norm, Place, Slot


class Skip(NamedTuple):
    """A dictionary's skip connection: `x -> x W^T` from a read site to a write site of one block."""

    W_skip: Float[Tensor, "d_out d_in"]
    read: str
    write: str


class Entry(NamedTuple):
    """Where a sweep starts: gradients at single positions of the residual stream."""

    gradient: Float[Tensor, "batch d_model"]
    positions: Int[Tensor, " batch"]
    first: Slot | None  # the first slot below; None: the embeddings
    only_attention: bool = False  # the gradient lies at what attention adds, not at the stream


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

    def __init__(
        self,
        weights: ModelWeights,
        forward: ForwardPass,
        *,
        skips: Mapping[int, Skip],
        written: Mapping[Slot, str],
        mlps: Mapping[int, LinearMLP],
        attentions: list[AttentionGradient] | None = None,
    ) -> None:
        """Take the prompt's forward pass.

        skips, mlps: by layer. written: the site that dictionaries write at each slot; nothing of what stood there
        before passes on. mlps: linearised MLPs of layers where the MLP itself is passed through. attentions: full
        gradients by layer; None for frozen patterns.
        """
        self.weights, self.forward, self.skips, self.written = weights, forward, skips, written
        self.mlps, self.attentions = mlps, attentions
        self.n_layers = len(weights.blocks)
        self.n_positions = forward.tokens.shape[0]

    def attention_norm(self, layer: int) -> tuple[Norm, Float[Tensor, "pos 1"]] | None:
        """The norm between attention's output and the stream, with its scale; None where the family has none."""
        norm, scale = self.weights.blocks[layer].ln1_post, self.forward.blocks[layer].ln1_post_scale
        return None if norm is None or scale is None else (norm, scale)

    def write_norm(self, layer: int, site: str) -> tuple[Norm, Float[Tensor, "pos 1"]] | None:
        """The norm between a write site and the stream, with its scale; None where there is none."""
        if site == "attn.hook_out":
            return self.attention_norm(layer)
        norm, scale = self.weights.blocks[layer].ln2_post, self.forward.blocks[layer].ln2_post_scale
        return None if site != "mlp.hook_out" or norm is None or scale is None else (norm, scale)

    # ---- forwards

    def attention(self, layer: int, residual: Float[Tensor, "*n pos d_model"], *, bias: bool = True) -> Tensor:
        """What attention adds to the stream at `layer`, linearised; of a full gradient without its error."""
        return self.write(layer, "attn.hook_out", self.raw_attention(layer, residual, bias=bias), bias=bias)

    def raw_attention(self, layer: int, residual: Float[Tensor, "*n pos d_model"], *, bias: bool = True) -> Tensor:
        """The same before a post-norm, at `attn.hook_out`."""
        weights = self.weights.blocks[layer]
        x = apply_norm(weights.ln1, self.forward.blocks[layer].ln1_scale, residual, bias=bias)
        if self.attentions is not None:
            out = self.attentions[layer].forward(x)
            return out + self.attentions[layer].constant if bias else out
        out = torch.einsum("...hpe,hed->...pd", self._mixed(layer, x, bias=bias), weights.W_O)
        return out + weights.b_O if bias and weights.b_O is not None else out

    def head_outputs(
        self, layer: int, residual: Float[Tensor, "*n pos d_model"]
    ) -> Float[Tensor, "*n heads pos d_head"]:
        """What changes of the stream make of each head's output, before `W_O`; raises InputError where attention has
        its full gradient, and the model does not show its heads."""
        x = apply_norm(self.weights.blocks[layer].ln1, self.forward.blocks[layer].ln1_scale, residual, bias=False)
        return self._mixed(layer, x, bias=False) if self.attentions is None else self.attentions[layer].head_outputs(x)

    def _mixed(self, layer: int, x: Tensor, *, bias: bool) -> Float[Tensor, "*n heads pos d_head"]:
        """Each head's values, mixed by its frozen pattern."""
        weights, pattern = self.weights.blocks[layer], self.forward.blocks[layer].pattern
        values = torch.einsum("...pd,gde->...gpe", x, weights.W_V)
        if bias and weights.b_V is not None:
            values = values + weights.b_V[:, None]
        groups = weights.W_O.shape[0] // weights.W_V.shape[0]
        return torch.einsum("gjqk,...gke->...gjqe", pattern.unflatten(0, (-1, groups)), values).flatten(-4, -3)

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

    def mlp(self, layer: int, mid: Float[Tensor, "pos d_model"], *, bias: bool = True) -> Tensor:
        """What a linearised MLP puts at `mlp.hook_out`, without its error; zero where it passes nothing."""
        if (mlp := self.mlps.get(layer)) is None:
            return torch.zeros_like(mid)
        out = mlp.forward(self.read(layer, "mlp.hook_in", mid, bias=bias))
        return out + mlp.constant if bias else out

    def skip(self, layer: int, mid: Float[Tensor, "pos d_model"], *, bias: bool = True) -> Tensor:
        """What a dictionary's skip connection puts at its write site; zero where there is none."""
        if (skip := self.skips.get(layer)) is None:
            return torch.zeros_like(mid)
        return self.read(layer, skip.read, mid, bias=bias) @ skip.W_skip.T

    # ---- transposed

    def transpose_read(
        self, layer: int, site: str, gradient: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """From gradients at a read site to gradients at `mid`, one position a row."""
        if site == "hook_resid_mid":
            return gradient
        norm, scale = self.weights.blocks[layer].ln2, self.forward.blocks[layer].ln2_scale[positions]
        if site == "mlp.hook_in":
            return transpose_norm(norm, scale, gradient)
        gradient = gradient / scale
        return gradient - gradient.mean(-1, keepdim=True) if norm.center else gradient

    def transpose_write(
        self, layer: int, site: str, gradient: Tensor, positions: Int[Tensor, " n"] | None = None
    ) -> Tensor:
        """From gradients in the stream to gradients at a write site; positions as in `transpose_read`, None where
        gradients are [batch, prefix, d_model]."""
        if (post_norm := self.write_norm(layer, site)) is None:
            return gradient
        norm, scale = post_norm
        return transpose_norm(norm, scale[slice(0, gradient.shape[1]) if positions is None else positions], gradient)

    def entry(self, layer: int, site: str, gradient: Tensor, positions: Int[Tensor, " n"], *, written: bool) -> Entry:
        """Where gradients at a read site of a layer go in, one position a row.

        written: whether the site is written too, as by an SAE; the gradients then lie on what stood there before.
        """
        if not written:  # a dictionary that replaces the MLP
            below = Slot(layer, Place.PRE if self.weights.parallel else Place.MID)
            return Entry(self.transpose_read(layer, site, gradient, positions), positions, below)
        if site == "hook_resid_post":
            return Entry(gradient, positions, Slot(layer, Place.MLP))
        if site == "hook_resid_mid":
            return Entry(gradient, positions, Slot(layer, Place.ATTENTION))
        if site == "hook_resid_pre":
            return Entry(gradient, positions, Slot(layer - 1, Place.POST) if layer else None)
        if site in ("attn.hook_out", "hook_attn_out"):
            if site == "hook_attn_out":
                gradient = self.transpose_write(layer, "attn.hook_out", gradient, positions)
            return Entry(gradient, positions, Slot(layer, Place.ATTENTION), only_attention=True)
        if site == "hook_mlp_out":
            gradient = self.transpose_write(layer, "mlp.hook_out", gradient, positions)
        mlp = self.mlps.get(layer)
        gradient = torch.zeros_like(gradient) if mlp is None else mlp.transpose(gradient, positions)
        return self.entry(layer, "mlp.hook_in", gradient, positions, written=False)

    def final_entry(self, directions: Float[Tensor, "n d_model"], positions: Int[Tensor, " n"]) -> Entry:
        """Where directions at the last norm's output go in."""
        gradient = transpose_norm(self.weights.ln_final, self.forward.ln_final_scale[positions], directions)
        return Entry(gradient, positions, Slot(self.n_layers - 1, Place.POST))

    def direct(self, entry: Entry) -> Iterator[tuple[Slot | None, Float[Tensor, "batch d_model"]]]:
        """The same gradients by paths that no attention is on, so that each stays at its own position.

        Yields the stream's gradient at every slot on the way down, attention's output among them.
        """
        stream, positions = entry.gradient, entry.positions
        if entry.only_attention:
            assert entry.first is not None
            yield entry.first, stream
            return
        first = entry.first
        for layer in range(-1 if first is None else first.layer, -1, -1):
            top = first.place if first is not None and layer == first.layer else Place.POST
            to_pre: Tensor | float = 0.0
            for place in reversed(Place):
                slot = Slot(layer, place)
                if place > top or (place is Place.MID and self.weights.parallel):
                    continue
                yield slot, stream
                if place is Place.MLP and self.weights.parallel:
                    to_pre = self.mlp_step(layer, stream, positions)
                elif place is Place.MLP:
                    stream = stream + self.mlp_step(layer, stream, positions)
                elif place is Place.ATTENTION:
                    stream = stream + to_pre
                elif slot in self.written:
                    return
        yield None, stream

    def at_heads(self, layer: int, gradient: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch heads d_head"]:
        """From gradients at attention's output (before a post-norm) to gradients at each head's own, before `W_O`."""
        return torch.einsum("bd,hed->bhe", gradient, self.weights.blocks[layer].W_O)

    def mlp_step(
        self, layer: int, post: Float[Tensor, "batch d_model"], positions: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d_model"] | float:
        """From `post` to where the MLP reads, by the skip connection or the linearised MLP, one position a row."""
        if layer in self.skips:
            skip = self.skips[layer]
            gradient = self.transpose_write(layer, skip.write, post, positions) @ skip.W_skip
            return self.transpose_read(layer, skip.read, gradient, positions)
        if layer in self.mlps and Slot(layer, Place.MLP) not in self.written:
            gradient = self.transpose_write(layer, "mlp.hook_out", post, positions)
            gradient = self.mlps[layer].transpose(gradient, positions)
            return self.transpose_read(layer, "mlp.hook_in", gradient, positions)
        return 0.0
