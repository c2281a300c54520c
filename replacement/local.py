"""The local replacement model of one prompt: active features, errors, and all else that its residual stream holds.

Every MLP's output is written as `sum_i a_i d_i + b_dec (+ W_skip x) + error`; with the linear path between, the model's
logits on this prompt are reproduced exactly. Position 0 follows the field's convention: it carries no features and no
errors, and what the MLPs write there is one source of its own, `bos`. Speaks of sites, features, decoder rows and
errors; knows nothing of graphs.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.dictionary import DictionarySet
from replacement.linear import LinearPath, Skip, apply_norm
from replacement.sites import ForwardPass, ModelWeights

DEFAULT_WRITE = "hook_mlp_out"  # where the error of a layer that has no dictionary is written


class Features(NamedTuple):
    """Active features, sorted by layer, position, feature."""

    layer: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    activation: Float[Tensor, " n"]


class Targets(NamedTuple):
    """Scalars whose sources are asked for, all read at the same block (or, at `layer == n_layers`, after the last
    norm).

    A target's value is `rows . x[position] + biases`, with x the activations at the site.
    """

    layer: int
    site: str  # a read site; not used at layer == n_layers
    positions: Int[Tensor, " n"]
    rows: Float[Tensor, "n d_model"]
    biases: Float[Tensor, " n"]


class Writes(NamedTuple):
    """What active features write at one layer's write site, sorted by position."""

    source: Int[Tensor, " n"]  # which feature of Features
    position: Int[Tensor, " n"]
    vectors: Float[Tensor, "n d_model"]  # activation times decoder row


class LocalModel:
    """A prompt's frozen linear model; built by `ReplacementModel.local`."""

    features: Features
    errors: Float[Tensor, "layer pos d_model"]  # at each layer's write site
    bos: Float[Tensor, "layer d_model"]  # what the MLPs write at position 0 beyond b_dec and skip
    trace_bos: bool

    def __init__(
        self, weights: ModelWeights, forward: ForwardPass, dictionaries: DictionarySet, *, trace_bos: bool
    ) -> None:
        self.forward, self.dictionaries, self.trace_bos = forward, dictionaries, trace_bos
        skips = {d.layer: Skip(d.W_skip.detach(), d.read, d.write) for d in dictionaries if d.W_skip is not None}
        self.path = LinearPath(weights, forward, skips)
        self.features = self._encode()
        self.errors, self.bos = self._errors()

    @property
    def n_layers(self) -> int:
        return self.path.n_layers

    @property
    def n_positions(self) -> int:
        return self.path.n_positions

    def write_site(self, layer: int) -> str:
        """The site at which `layer`'s MLP is replaced."""
        writers = self.dictionaries.writers(layer)
        return writers[0].write if writers else DEFAULT_WRITE

    def _encode(self) -> Features:
        parts = []
        for dictionary in self.dictionaries:
            activations = dictionary.encode(self.forward.blocks[dictionary.layer].reads[dictionary.read])
            if not self.trace_bos:
                activations[0] = 0
            position, feature = activations.nonzero(as_tuple=True)  # sorted by position, then feature
            layer = torch.full_like(position, dictionary.layer)
            parts.append(Features(layer, position, feature, activations[position, feature]))
        if not parts:
            empty = torch.zeros(0, dtype=torch.long, device=self.forward.tokens.device)
            return Features(empty, empty, empty, empty.to(self.forward.embedding.dtype))
        return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _errors(self) -> tuple[Tensor, Tensor]:
        blocks = enumerate(self.forward.blocks)
        errors = torch.stack([block.writes[self.write_site(layer)] for layer, block in blocks])
        for dictionary in self.dictionaries:
            x = self.forward.blocks[dictionary.layer].reads[dictionary.read]
            errors[dictionary.layer] -= dictionary.b_dec + dictionary.skip(x)
        for layer, writes in enumerate(self.writes):
            errors[layer].index_add_(0, writes.position, writes.vectors, alpha=-1)
        bos = torch.zeros_like(errors[:, 0])
        if not self.trace_bos:  # the whole of position 0 is one source: features and what they miss
            bos = errors[:, 0].clone()
            errors[:, 0] = 0
        return errors, bos

    @cached_property
    def writes(self) -> tuple[Writes, ...]:
        """What the active features write, by layer."""
        return tuple(self._writes(layer) for layer in range(self.n_layers))

    def _writes(self, layer: int) -> Writes:
        table, parts = self.features, []
        for dictionary in self.dictionaries.writers(layer):
            index = (table.layer == dictionary.layer).nonzero()[:, 0]
            rows = dictionary.write_rows(table.feature[index], layer)
            parts.append((index, table.position[index], rows * table.activation[index][:, None]))
        if not parts:
            return Writes(table.layer[:0], table.layer[:0], self.zeros(0))
        index, position, vectors = (torch.cat(column) for column in zip(*parts, strict=True))
        order = torch.argsort(position, stable=True)
        return Writes(index[order], position[order], vectors[order])

    def zeros(self, rows: int) -> Float[Tensor, "rows d_model"]:
        """Zeros of the stream's width, dtype and device."""
        return self.forward.embedding.new_zeros(rows, self.forward.embedding.shape[1])

    def output_bias(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What is added to the stream at `layer` whatever the input: `b_dec` through the post-norm, and the norm's
        bias."""
        site = self.write_site(layer)
        dictionary = self.dictionaries.by_layer.get(layer)
        value = self.zeros(self.n_positions)
        return self.path.write(layer, site, value if dictionary is None else value + dictionary.b_dec)

    def feature_targets(self, index: Int[Tensor, " n"]) -> Targets:
        """Pre-activations of the listed features, all of one layer, as targets."""
        layer = int(self.features.layer[index[0]])
        assert (self.features.layer[index] == layer).all()
        dictionary, positions = self.dictionaries.by_layer[layer], self.features.position[index]
        x = self.forward.blocks[layer].reads[dictionary.read][positions]
        rows, biases = dictionary.encoder_rows(self.features.feature[index], x)
        return Targets(layer, dictionary.read, positions, rows, biases)

    @cached_property
    def constant_stream(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """By layer, what constants add to the stream: at attention's write, and at the MLP's."""
        constants = (self.path.constants(layer) for layer in range(self.n_layers))
        return tuple((attn, mlp + self.output_bias(layer)) for layer, (attn, mlp) in enumerate(constants))

    def logits(self) -> Float[Tensor, "pos vocab"]:
        """The logits of the local model, every feature recomputed from its encoder row on the linear stream.

        They equal the language model's: the errors see to it.
        """
        path, weights = self.path, self.path.weights
        stream = self.forward.embedding
        if self.forward.position_embedding is not None:
            stream = stream + self.forward.position_embedding
        activation = torch.zeros_like(self.features.activation)
        for layer in range(self.n_layers):
            attention = path.attention(layer, stream)
            middle = path.middle(layer, stream, attention)
            value = self.errors[layer].clone()
            value[0] += self.bos[layer]
            dictionary = self.dictionaries.by_layer.get(layer)
            if dictionary is not None:
                x = path.read(layer, dictionary.read, middle)
                index = (self.features.layer == layer).nonzero()[:, 0]
                if len(index):
                    _, _, positions, rows, biases = self.feature_targets(index)
                    activation[index] = (rows * x[positions]).sum(-1) + biases
                value += dictionary.b_dec + dictionary.skip(x)
            for writer in self.dictionaries.writers(layer):
                index = (self.features.layer == writer.layer).nonzero()[:, 0]
                rows = writer.write_rows(self.features.feature[index], layer)
                value.index_add_(0, self.features.position[index], rows * activation[index][:, None])
            stream = stream + attention + path.write(layer, self.write_site(layer), value)
        final = apply_norm(weights.ln_final, self.forward.ln_final_scale, stream)
        return soft_cap(final @ weights.W_U + weights.b_U, weights.logit_soft_cap)


def soft_cap(logits: Float[Tensor, "*axes vocab"], cap: float | None) -> Float[Tensor, "*axes vocab"]:
    """`cap * tanh(logits / cap)`, or the logits as they are (Gemma 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
