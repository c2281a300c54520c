"""What every dictionary promises, and a set of them that covers a model's layers.

A dictionary reads activations at one site, turns them into few active features, and writes an approximation of the
activations at one site or several. This file states the contract; kinds are one file each. It knows nothing of hooks,
of prompts or of graphs.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from replacement.activation import Activation
from replacement.encoding import Encoding
from replacement.errors import InputError


class Dictionary(nn.Module, abc.ABC):
    """A sparse dictionary that replaces (a part of) an MLP.

    Laws, held by tests for every kind:

    - *affine on the active set*: for an active feature i at input x, `encode(x)[i] = w_i . x + b_i` with
      `w_i, b_i = encoder_rows(i, x)`, and `w_i` is the gradient of `encode(x)[i]` (for neurons: with the gate held
      at its value; for a switch encoder: with the router held);
    - *linear writes*: what it adds at layer l is `sum_i a_i write_rows(i, l)`, plus at its own layer `b_dec` and
    `W_skip x`.
    """

    kind: str  #: the field's name of the kind: "transcoder", "cross_layer_transcoder", "neurons"
    layer: int  #: the block whose site is read
    read: str  #: site that is read, a name of `replacement.sites.READ_SITES`
    write: str  #: site that is written, a name of `replacement.sites.WRITE_SITES`
    write_layers: tuple[int, ...]  #: blocks whose write site receives decoder rows
    n_features: int
    d_in: int  #: width of what is read
    d_out: int  #: width of what is written
    b_dec: Tensor  #: [d_out], added once at `layer`
    W_skip: Tensor | None  #: [d_out, d_in], adds `W_skip x` at `layer`; None where the kind has no skip

    @abc.abstractmethod
    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... n_features"]:
        """Activations of every feature, zero where inactive."""

    @abc.abstractmethod
    def encoder_rows(
        self, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """The affine map of each listed feature at its own input: rows `w_i` and biases `b_i` with `a_i = w_i . x_i +
        b_i`."""

    @abc.abstractmethod
    def write_rows(self, features: Int[Tensor, " n"], layer: int) -> Float[Tensor, "n d_out"]:
        """What one unit of each listed feature writes at `layer`, one of `write_layers`: a copy, the caller's own."""

    @abc.abstractmethod
    def decode(self, activations: Float[Tensor, "... n_features"], layer: int) -> Float[Tensor, "... d_out"]:
        """What all features together write at `layer`: `sum_i a_i write_rows(i, layer)`, without `b_dec` and skip."""

    def compute_in(self, device: torch.device, dtype: torch.dtype) -> None:
        """Freeze, and move to where and in what precision is computed.

        Encoder and decoder stay in the precision that they were stored in, on a CPU mapped from their file: a trace
        gathers few rows of the decoder, and all of either may be more than there is memory. Rows are converted as they
        are used, some at a time.
        """
        kept = {name: self._parameters.pop(name, None) for name in ("W_enc", "W_dec")}
        self.requires_grad_(False).to(device=device, dtype=dtype)
        for name, rows in kept.items():
            if rows is not None:
                setattr(self, name, nn.Parameter(rows.detach().to(device), requires_grad=False))

    def skip(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"] | float:
        """`W_skip x`, zero for kinds without a skip connection."""
        return 0.0 if self.W_skip is None else x @ self.W_skip.T


class LearnedDictionary(Dictionary):
    """A dictionary with weights of its own: SAEs, transcoders and crosscoders, but not the model's neurons.

    Its encoding says how features are made of encoder rows: `act(x W_enc^T + b_enc)`, one a row, where it is linear.
    """

    W_enc: nn.Parameter  # [rows, d_in]
    b_enc: nn.Parameter  # [rows]
    activation: Activation
    encoding: Encoding

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... n_features"]:
        return self.encoding.encode(x, self.W_enc, self.b_enc, self.activation)

    def encoder_rows(
        self, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        return self.encoding.rows(features, x, self.W_enc, self.b_enc)


@dataclass(frozen=True)
class DictionarySet:
    """Dictionaries of one model, at most one reading at each layer."""

    by_layer: Mapping[int, Dictionary]  #: reading layer -> dictionary
    name: str  #: how reports call it: a folder, a hub id, "neurons"
    labels: Mapping[int, Mapping[int, str]] = field(default_factory=dict)  #: layer -> feature -> words
    metadata: Mapping[str, Any] = field(default_factory=dict)  #: what the folder's config said beyond the weights

    def __post_init__(self) -> None:
        for layer, dictionary in self.by_layer.items():
            if dictionary.layer != layer:
                raise InputError(
                    f"{self.name}: the dictionary filed under layer {layer} reads layer {dictionary.layer}"
                )
        for layer in sorted({layer for dictionary in self for layer in dictionary.write_layers}):
            sites = sorted({dictionary.write for dictionary in self.writers(layer)})
            if len(sites) > 1:
                raise InputError(f"{self.name}: layer {layer} is written at {' and '.join(sites)}, needs one site")

    def __len__(self) -> int:
        return len(self.by_layer)

    def __iter__(self) -> Iterator[Dictionary]:
        """Dictionaries in the order of their layers."""
        return (self.by_layer[layer] for layer in sorted(self.by_layer))

    def writers(self, layer: int) -> list[Dictionary]:
        """Dictionaries whose features write at `layer`, in the order of their reading layers."""
        return [dictionary for dictionary in self if layer in dictionary.write_layers]

    def label(self, layer: int, feature: int) -> str:
        """The feature's words, or "" where it has none."""
        return self.labels.get(layer, {}).get(feature, "")
