"""What needs no dictionary: the simple approximations that a dictionary is measured against, at the same L0.

All of them see the same tokens. Knows activations and the contract of dictionaries; a baseline is fitted on one half of
a sample and measured on the other by whoever calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.activation import TopK
from replacement.errors import InputError
from replacement.neurons import Neurons
from replacement.transcoder import Transcoder

_ROWS = 1024


class Components(NamedTuple):
    """An affine map of rank k: `y' = ((x - x_mean) @ reads.T) @ writes + y_mean`; each row pair is one component."""

    reads: Float[Tensor, "k d_in"]
    writes: Float[Tensor, "k d_out"]  #: orthonormal rows
    x_mean: Float[Tensor, " d_in"]
    y_mean: Float[Tensor, " d_out"]

    def encode(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens k"]:
        """Value of each component."""
        return (x.double() - self.x_mean) @ self.reads.T

    def approximate(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_out"]:
        """The map's value, float64."""
        return self.encode(x) @ self.writes + self.y_mean


def principal_components(x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], k: int) -> Components:
    """The best affine map from x to y with k components (reduced-rank regression, Izenman 1975); PCA where y is x.

    `B = argmin |Y - X B|^2` projected onto the k directions of output in which `X B` varies most; in float64. All
    components are active at every token, so their number is their L0.
    """
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    x_centred, y_centred = x.double() - x_mean, y.double() - y_mean
    full = torch.linalg.lstsq(x_centred, y_centred, driver="gelsd").solution
    fitted = x_centred @ full
    _, vectors = torch.linalg.eigh(fitted.T @ fitted)  # ascending
    writes = vectors.flip(1)[:, :k].T
    return Components(writes @ full.T, writes, x_mean, y_mean)


def random_dictionary(
    x: Float[Tensor, "tokens d_in"],
    y: Float[Tensor, "tokens d_out"],
    *,
    n_features: int,
    k: int,
    layer: int,
    read: str,
    write: str,
    seed: int = 0,
    ridge: float = 1e-3,
) -> Transcoder:
    """A dictionary whose encoder is random: TopK of random directions, with the best decoder for them.

    Encoder rows are normal, `b_enc = -W_enc . mean x`; `W_dec = argmin |Y - mean Y - A W_dec|^2 + ridge tr(A^T A) / n
    |W_dec|^2` on the given tokens, A the activations, in float64. What a dictionary has beyond it is its encoder's.
    """
    if n_features < 1 or k < 1:
        raise InputError(f"random_dictionary(n_features={n_features}, k={k}): needs at least 1 of each")
    generator = torch.Generator().manual_seed(seed)
    W_enc = (torch.randn(n_features, x.shape[1], generator=generator) / x.shape[1] ** 0.5).to(x)
    b_enc = -(W_enc.double() @ x.double().mean(0)).to(x.dtype)
    activation, y_mean = TopK(min(k, n_features)), y.double().mean(0)
    gram = torch.zeros(n_features, n_features, dtype=torch.float64, device=x.device)
    moment = torch.zeros(n_features, y.shape[1], dtype=torch.float64, device=x.device)
    for x_part, y_part in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
        a = activation(x_part @ W_enc.T + b_enc).double()
        gram += a.T @ a
        moment += a.T @ (y_part.double() - y_mean)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    W_dec = torch.linalg.solve(gram, moment).to(x.dtype)
    return Transcoder(
        layer=layer, read=read, write=write, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=y_mean.to(x.dtype),
        activation=activation,
    )  # fmt: skip


def strongest_neurons(neurons: Neurons, x: Float[Tensor, "tokens d_in"], k: int) -> Float[Tensor, "tokens d_mlp"]:
    """The model's own neurons, of which only the k that write most, `|a_i| |d_i|`, stay at each token."""
    activations = neurons.encode(x)
    chosen = (activations.abs() * neurons.W_dec.norm(dim=1)).topk(min(k, neurons.n_features), dim=-1).indices
    return torch.zeros_like(activations).scatter(-1, chosen, activations.gather(-1, chosen))
