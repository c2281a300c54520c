"""A model's own MLP neurons as a dictionary: the baseline that needs no training.

One feature per hidden unit. A neuron is no affine function of its input, so its encoder row is that of layer-wise
relevance at that input (RelP; Jafari et al. 2025): the ratio `act(z) / z` is held at its value, and of a gated product
each factor gets half. Rows then still add up to the activation exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError


class Neurons(Dictionary):
    """`a = act(x W_gate^T + b_gate) * (x W_enc^T + b_enc)`, or `act(x W_enc^T + b_enc)` without a gate; writes `a
    W_dec + b_dec`."""

    kind = "neurons"
    W_skip = None

    def __init__(
        self,
        *,
        layer: int,
        read: str,
        write: str,
        W_enc: Float[Tensor, "n_features d_in"],
        b_enc: Float[Tensor, " n_features"],
        W_gate: Float[Tensor, "n_features d_in"] | None,
        b_gate: Float[Tensor, " n_features"] | None,
        W_dec: Float[Tensor, "n_features d_out"],
        b_dec: Float[Tensor, " d_out"],
        nonlinearity: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.layer, self.read, self.write, self.write_layers = layer, read, write, (layer,)
        self.n_features, self.d_in = W_enc.shape
        self.d_out = W_dec.shape[1]
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_gate = None if W_gate is None else nn.Parameter(W_gate)
        self.b_gate = None if b_gate is None else nn.Parameter(b_gate)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.nonlinearity = nonlinearity

    def compute_in(self, device: torch.device, dtype: torch.dtype) -> None:
        """All weights, the output map too: it is the language model's, and not read row by row alone."""
        self.requires_grad_(False).to(device=device, dtype=dtype)

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... n_features"]:
        pre = F.linear(x, self.W_enc, self.b_enc)
        if self.W_gate is None:
            return self.nonlinearity(pre)
        return self.nonlinearity(F.linear(x, self.W_gate, self.b_gate)) * pre

    def encoder_rows(
        self, features: Int[Tensor, " n"], x: Float[Tensor, "n d_in"]
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        rows, biases = self.W_enc[features], self.b_enc[features]
        pre = (rows * x).sum(-1) + biases
        if self.W_gate is None:
            ratio = self.ratio(pre)
            return rows * ratio[:, None], biases * ratio
        gate_rows, b_gate = self.W_gate[features], 0.0 if self.b_gate is None else self.b_gate[features]
        gate = (gate_rows * x).sum(-1) + b_gate
        c_in, c_gate = self.nonlinearity(gate) / 2, pre * self.ratio(gate) / 2
        return rows * c_in[:, None] + gate_rows * c_gate[:, None], biases * c_in + b_gate * c_gate

    def ratios(self, x: Float[Tensor, "pos d_in"]) -> tuple[Float[Tensor, "pos n"], Float[Tensor, "pos n"] | None]:
        """By what RelP multiplies each neuron's input, and its gate's, at every position."""
        pre = F.linear(x, self.W_enc, self.b_enc)
        if self.W_gate is None:
            return self.ratio(pre), None
        gate = F.linear(x, self.W_gate, self.b_gate)
        return self.nonlinearity(gate) / 2, pre * self.ratio(gate) / 2

    def derivatives(self, x: Float[Tensor, "pos d_in"]) -> tuple[Float[Tensor, "pos n"], Float[Tensor, "pos n"] | None]:
        """Each neuron's derivative by its input, and by its gate's, at every position."""
        pre = F.linear(x, self.W_enc, self.b_enc)
        if self.W_gate is None:
            return self._slope(pre), None
        gate = F.linear(x, self.W_gate, self.b_gate)
        return self.nonlinearity(gate), pre * self._slope(gate)

    def ratio(self, pre: Float[Tensor, "*axes n"]) -> Float[Tensor, "*axes n"]:
        """`act(z) / z`, its limit `act'(0)` at zero."""
        safe = torch.where(pre == 0, torch.ones_like(pre), pre)
        return torch.where(pre == 0, self._slope(torch.zeros_like(pre)), self.nonlinearity(safe) / safe)

    def _slope(self, pre: Tensor) -> Tensor:
        with torch.enable_grad():
            at = pre.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.nonlinearity(at).sum(), at)
        return slope

    def write_rows(self, features: Int[Tensor, " n"], layer: int) -> Float[Tensor, "n d_out"]:
        assert layer == self.layer
        return self.W_dec.index_select(0, features)

    def decode(self, activations: Float[Tensor, "... n_features"], layer: int) -> Float[Tensor, "... d_out"]:
        assert layer == self.layer
        return activations @ self.W_dec


def neurons(bridge: Any, dtype: torch.dtype, *, layers: Collection[int] | None = None) -> DictionarySet:
    """Every MLP neuron of a TransformerBridge as a feature, of some layers or (None) all."""
    from transformer_lens.model_bridge.generalized_components.gated_mlp import resolve_activation_fn

    def rows(weight: Tensor) -> Tensor:
        return weight.detach().to(dtype).contiguous()

    by_layer: dict[int, Dictionary] = {}
    for layer, block in enumerate(bridge.blocks):
        if layers is not None and layer not in layers:
            continue
        mlp = block.mlp
        try:
            W_in, W_out = mlp.W_in, mlp.W_out  # [d_model, d_mlp], [d_mlp, d_model]
        except AttributeError as error:
            raise InputError(
                f"neurons of layer {layer}: this architecture's MLP shows no W_in, W_out ({error})"
            ) from error
        W_gate = getattr(mlp, "W_gate", None)
        d_model, width = W_in.shape
        by_layer[layer] = Neurons(
            layer=layer,
            read="mlp.hook_in",
            write="mlp.hook_out",
            W_enc=rows(W_in.T),
            b_enc=_bias(mlp, "b_in", W_in, width, dtype),
            W_gate=None if W_gate is None else rows(W_gate.T),
            b_gate=None if W_gate is None else _bias(mlp, "b_gate", W_in, width, dtype),
            W_dec=rows(W_out),
            b_dec=_bias(mlp, "b_out", W_in, d_model, dtype),
            nonlinearity=resolve_activation_fn(bridge.cfg),
        )
    return DictionarySet(by_layer, "neurons")


def _bias(mlp: Any, name: str, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    bias = getattr(mlp, name, None)
    return torch.zeros(width, dtype=dtype, device=like.device) if bias is None else bias.detach().to(dtype)
