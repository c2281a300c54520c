"""Crosscoders: one set of features that reads and writes several layers, or several models, at once.

Lindsey et al. 2024 (acausal crosscoders; model diffing). Inference only; knows nothing of how it was trained.
"""

from __future__ import annotations

import re

from jaxtyping import Float, Int
from torch import Tensor, nn

from replacement.activation import Activation
from replacement.dictionary import LearnedDictionary
from replacement.encoding import LINEAR, Encoding
from replacement.errors import InputError
from replacement.stored import written

_PART = re.compile(r"(?:(?P<model>[\w-]+):)?blocks\.(?P<layer>\d+)\.(?P<site>[\w.]+)")


class Crosscoder(LearnedDictionary):
    """`a = act([x_1 .. x_n] W_enc^T + b_enc)`; writes `a W_dec[:, j] + b_dec[j]` at part j.

    Its parts are hooks, `blocks.2.hook_resid_post`, with a model's name before them (`tuned:blocks.2...`) where several
    models are read. `layer` and `b_dec` of the contract are those of all parts: the first one's layer, one bias a part.
    """

    kind = "crosscoder"
    W_dec: nn.Parameter  # [n_features, n_parts, d_out]
    b_dec: nn.Parameter  # [n_parts, d_out]
    W_skip = None

    def __init__(
        self,
        *,
        parts: tuple[str, ...],
        site: str,
        W_enc: Float[Tensor, "rows n_parts*d_out"],
        b_enc: Float[Tensor, " rows"],
        W_dec: Float[Tensor, "n_features n_parts d_out"],
        b_dec: Float[Tensor, "n_parts d_out"],
        activation: Activation,
        encoding: Encoding = LINEAR,
    ) -> None:
        super().__init__()
        found = [_PART.fullmatch(part) for part in parts]
        if not parts or any(match is None or match["site"] != site for match in found):
            raise InputError(f"crosscoder: parts {list(parts)} need names like 'blocks.0.{site}'")
        if len(set(parts)) != len(parts):
            raise InputError(f"crosscoder: parts {list(parts)} name one hook twice")
        self.parts = parts
        self.part_layers = tuple(int(match["layer"]) for match in found if match)
        self.models = tuple(dict.fromkeys(match["model"] or "" for match in found if match))
        self.layer, self.read, self.write = self.part_layers[0], site, site
        self.write_layers = tuple(dict.fromkeys(self.part_layers))
        self.n_features, self.d_in = encoding.n_features(len(W_enc)), W_enc.shape[1]
        self.d_out = self.d_in // len(parts)
        expected = {
            "b_enc": (b_enc, W_enc.shape[:1]),
            "W_dec": (W_dec, (self.n_features, len(parts), self.d_out)),
            "b_dec": (b_dec, (len(parts), self.d_out)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or self.d_out * len(parts) != self.d_in:
                raise InputError(
                    f"crosscoder: {name} has shape {list(tensor.shape)}, needs {list(shape)} "
                    f"to fit W_enc {list(W_enc.shape)} and {len(parts)} parts"
                )
        activation.require_width(self.n_features, "crosscoder")
        encoding.require_fit(W_enc, activation, "crosscoder")
        self.W_enc, self.b_enc = nn.Parameter(W_enc), nn.Parameter(b_enc)
        self.W_dec, self.b_dec = nn.Parameter(W_dec), nn.Parameter(b_dec)
        self.activation, self.encoding = activation, encoding

    def part(self, layer: int, model: str = "") -> int:
        """Index of the part at a layer of a model; raises `InputError` where there is none."""
        for index, name in enumerate(self.parts):
            match = _PART.fullmatch(name)
            if match and int(match["layer"]) == layer and (match["model"] or "") == (model or self.models[0]):
                return index
        raise InputError(f"crosscoder: has no part at layer {layer} of model {model!r}; parts: {', '.join(self.parts)}")

    def write_rows(self, features: Int[Tensor, " n"], layer: int) -> Float[Tensor, "n d_out"]:
        return self.W_dec[:, self.part(layer)].index_select(0, features).to(self.b_dec.dtype)

    def decode(self, activations: Float[Tensor, "... n_features"], layer: int) -> Float[Tensor, "... d_out"]:
        return written(activations, self.W_dec[:, self.part(layer)])

    def forward(self, x: Float[Tensor, "... n_parts*d_out"]) -> Float[Tensor, "... n_parts d_out"]:
        """The reconstruction of every part, from all parts side by side."""
        return written(self.encode(x), self.W_dec.flatten(1)).unflatten(-1, (len(self.parts), self.d_out)) + self.b_dec
