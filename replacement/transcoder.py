"""Dictionaries that read one site of a layer and write one: transcoders, skip transcoders, sparse autoencoders.

Dunefsky et al. 2024 (transcoder) and Paulo et al. 2025 (skip transcoder) read an MLP's input and write its output; a
sparse autoencoder (Bricken et al. 2023) writes where it reads.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from replacement.activation import Activation
from replacement.dictionary import LearnedDictionary
from replacement.encoding import LINEAR, Encoding
from replacement.errors import InputError
from replacement.stored import written


class Transcoder(LearnedDictionary):
    """`y = act(x W_enc^T + b_enc) W_dec + b_dec (+ x W_skip^T)`, one feature per row of `W_enc` and `W_dec`.

    Its kind is "sae" where it writes what it reads, else "skip_transcoder" or "transcoder".
    """

    KINDS = ("transcoder", "skip_transcoder", "sae")
    W_dec: nn.Parameter  # [n_features, d_out]
    b_dec: nn.Parameter  # [d_out]
    W_skip: nn.Parameter | None  # [d_out, d_in]

    def __init__(
        self,
        *,
        layer: int,
        read: str,
        write: str,
        W_enc: Float[Tensor, "rows d_in"],
        b_enc: Float[Tensor, " rows"],
        W_dec: Float[Tensor, "n_features d_out"],
        b_dec: Float[Tensor, " d_out"],
        activation: Activation,
        W_skip: Float[Tensor, "d_out d_in"] | None = None,
        encoding: Encoding = LINEAR,
    ) -> None:
        super().__init__()
        self.layer, self.read, self.write, self.write_layers = layer, read, write, (layer,)
        self.kind = "sae" if read == write else "transcoder" if W_skip is None else "skip_transcoder"
        self.n_features, self.d_in = encoding.n_features(len(W_enc)), W_enc.shape[1]
        self.d_out = W_dec.shape[1]
        expected = {
            "b_enc": (b_enc, W_enc.shape[:1]),
            "W_dec": (W_dec, (self.n_features, self.d_out)),
            "b_dec": (b_dec, (self.d_out,)),
            "W_skip": (W_skip, (self.d_out, self.d_in)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(
                    f"transcoder of layer {layer}: {name} has shape {list(tensor.shape)}, needs {list(shape)} "
                    f"to fit W_enc {list(W_enc.shape)} and W_dec {list(W_dec.shape)}"
                )
        activation.require_width(self.n_features, f"transcoder of layer {layer}")
        encoding.require_fit(W_enc, activation, f"transcoder of layer {layer}")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.W_skip = None if W_skip is None else nn.Parameter(W_skip)
        self.activation, self.encoding = activation, encoding

    def write_rows(self, features: Int[Tensor, " n"], layer: int) -> Float[Tensor, "n d_out"]:
        assert layer == self.layer
        return self.W_dec.index_select(0, features).to(self.b_dec.dtype)

    def decode(self, activations: Float[Tensor, "... n_features"], layer: int) -> Float[Tensor, "... d_out"]:
        assert layer == self.layer
        return written(activations, self.W_dec)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """The approximation of what stands at the written site, at input x."""
        return self.decode(self.encode(x), self.layer) + self.b_dec + self.skip(x)
