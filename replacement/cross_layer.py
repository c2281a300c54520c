"""Cross-layer transcoders: read one MLP's input, write to the outputs of that MLP and all later ones.

Lindsey et al. 2024, Ameisen et al. 2025. One object is the part of the CLT that reads one layer. A weakly causal
crosscoder is the same shape on one site, say the residual stream. Inference only.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from replacement.activation import Activation
from replacement.dictionary import LearnedDictionary
from replacement.encoding import LINEAR, Encoding
from replacement.errors import InputError
from replacement.stored import written


class CrossLayerTranscoder(LearnedDictionary):
    """`a = act(x_l W_enc^T + b_enc)`; adds `a W_dec[:, j]` at layer `l + j`, and `b_dec` once at layer l."""

    KINDS = ("cross_layer_transcoder", "causal_crosscoder")
    W_dec: nn.Parameter  # [n_features, n_writes, d_out], slot j writes at layer + j
    b_dec: nn.Parameter  # [d_out]
    W_skip = None

    def __init__(
        self,
        *,
        layer: int,
        read: str,
        write: str,
        W_enc: Float[Tensor, "rows d_in"],
        b_enc: Float[Tensor, " rows"],
        W_dec: Float[Tensor, "n_features n_writes d_out"],
        b_dec: Float[Tensor, " d_out"],
        activation: Activation,
        encoding: Encoding = LINEAR,
    ) -> None:
        super().__init__()
        self.layer, self.read, self.write = layer, read, write
        self.kind = "causal_crosscoder" if read == write else "cross_layer_transcoder"
        self.n_features, self.d_in = encoding.n_features(len(W_enc)), W_enc.shape[1]
        if W_dec.ndim != 3 or W_dec.shape[0] != self.n_features or b_enc.shape != W_enc.shape[:1]:
            raise InputError(
                f"cross-layer transcoder of layer {layer}: W_dec has shape {list(W_dec.shape)} and b_enc "
                f"{list(b_enc.shape)}, needs [{self.n_features}, n_writes, d_out] and [{len(W_enc)}] "
                f"to fit W_enc {list(W_enc.shape)}"
            )
        self.d_out = W_dec.shape[2]
        if b_dec.shape != (self.d_out,):
            raise InputError(
                f"cross-layer transcoder of layer {layer}: b_dec has shape {list(b_dec.shape)}, needs [{self.d_out}]"
            )
        if W_dec.shape[1] < 1:
            raise InputError(f"cross-layer transcoder of layer {layer}: W_dec has no slots, needs 1 or more")
        activation.require_width(self.n_features, f"cross-layer transcoder of layer {layer}")
        encoding.require_fit(W_enc, activation, f"cross-layer transcoder of layer {layer}")
        self.write_layers = tuple(range(layer, layer + W_dec.shape[1]))
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.activation, self.encoding = activation, encoding

    def write_rows(self, features: Int[Tensor, " n"], layer: int) -> Float[Tensor, "n d_out"]:
        return self.W_dec[:, layer - self.layer].index_select(0, features).to(self.b_dec.dtype)

    def decode(self, activations: Float[Tensor, "... n_features"], layer: int) -> Float[Tensor, "... d_out"]:
        return written(activations, self.W_dec[:, layer - self.layer])
