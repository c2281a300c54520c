"""How a dictionary's features are made of its encoder rows: one each, by a router among experts, or in pairs.

An encoding gets `x W_enc^T + b_enc` to work with and the activation function, and owns only what it needs beyond them.
Knows nothing of sites, of decoders or of training.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from replacement.activation import Activation, TopK
from replacement.errors import InputError
from replacement.stored import pre_activations


class Encoding(nn.Module, abc.ABC):
    """From encoder rows to features.

    Law, held by tests for every encoding: for an active feature i at x, `encode(x)[i] = w_i . x + b_i` with
    `w_i, b_i = rows(i, x)`; each class says of what w_i is the gradient.
    """

    name: str

    @abc.abstractmethod
    def n_features(self, n_rows: int) -> int:
        """Features that so many encoder rows make."""

    @abc.abstractmethod
    def encode(
        self,
        x: Float[Tensor, "... d_in"],
        W_enc: Float[Tensor, "rows d_in"],
        b_enc: Float[Tensor, " rows"],
        activation: Activation,
    ) -> Float[Tensor, "... n_features"]:
        """Activations of every feature, zero where inactive."""

    @abc.abstractmethod
    def rows(
        self,
        features: Int[Tensor, " n"],
        x: Float[Tensor, "n d_in"],
        W_enc: Float[Tensor, "rows d_in"],
        b_enc: Float[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, " n"]]:
        """The affine map of each listed feature at its own input."""

    def settings(self) -> dict[str, Any]:
        """What a config file needs beside the tensors to build this again."""
        return {"name": self.name}

    def require_fit(self, W_enc: Float[Tensor, "rows d_in"], activation: Activation, where: str) -> None:
        """Raise InputError, which begins with `where`, unless rows and activation suit this encoding."""
        return None


class Linear(Encoding):
    """One feature a row: `act(x W_enc^T + b_enc)`; its row is the gradient."""

    name = "linear"

    def n_features(self, n_rows: int) -> int:
        return n_rows

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, activation: Activation) -> Float[Tensor, "... n"]:
        return activation(pre_activations(x, W_enc, b_enc))

    def rows(self, features: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        return W_enc[features].to(x.dtype), b_enc[features]


class Route(NamedTuple):
    """Where a router sends each token."""

    expert: Int[Tensor, " tokens"]
    probability: Float[Tensor, " tokens"]  #: that it gives to that expert


class Switch(Encoding):
    """One expert a token: `a_i = p_e act(w_i . x + b_i)` for the features of the likeliest expert e, 0 for all others.

    `p = softmax(x W_router^T + b_router)` (Mudide et al. 2024, "Efficient Dictionary Learning with Switch Sparse
    Autoencoders"). Features of an expert stand side by side, so that only its rows are multiplied. The encoder row
    `p_e w_i` holds the choice of the expert and p_e at their values at x, as a neuron's row holds its gate: it is the
    gradient of everything but the router.
    """

    name = "switch"
    W_router: nn.Parameter  # [experts, d_in]
    b_router: nn.Parameter  # [experts]

    def __init__(self, W_router: Float[Tensor, "experts d_in"], b_router: Float[Tensor, " experts"]) -> None:
        super().__init__()
        if W_router.ndim != 2 or b_router.shape != W_router.shape[:1] or not len(W_router):
            raise InputError(
                f"switch: W_router has shape {list(W_router.shape)} and b_router {list(b_router.shape)}, "
                "needs [experts, d_in] and [experts]"
            )
        self.W_router, self.b_router = nn.Parameter(W_router), nn.Parameter(b_router)

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.b_router)

    def n_features(self, n_rows: int) -> int:
        return n_rows

    def probabilities(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens experts"]:
        """What the router gives to each expert."""
        return F.linear(x, self.W_router, self.b_router).softmax(-1)

    def route(self, x: Float[Tensor, "tokens d_in"]) -> Route:
        """The likeliest expert of each token."""
        probability, expert = self.probabilities(x).max(-1)
        return Route(expert, probability)

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, activation: Activation) -> Float[Tensor, "... n"]:
        tokens, size = x.flatten(0, -2) if x.ndim > 1 else x[None], len(W_enc) // self.experts
        route = self.route(tokens)
        pre = tokens.new_full((len(tokens), len(W_enc)), torch.finfo(x.dtype).min)  # below whatever competes in a TopK
        for expert in route.expert.unique().tolist():
            at, own = (route.expert == expert).nonzero()[:, 0], slice(expert * size, (expert + 1) * size)
            pre[at, own] = pre_activations(tokens[at], W_enc[own], b_enc[own])
        chosen = torch.arange(len(W_enc), device=x.device) // size == route.expert[:, None]
        active = torch.where(chosen, activation(pre), 0.0)
        return (active * route.probability[:, None]).view(*x.shape[:-1], len(W_enc))

    def rows(self, features: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        expert = features // (len(W_enc) // self.experts)
        probability = self.probabilities(x).gather(1, expert[:, None])
        return W_enc[features] * probability, b_enc[features] * probability[:, 0]

    def require_fit(self, W_enc: Tensor, activation: Activation, where: str) -> None:
        if W_enc.shape[1] != self.W_router.shape[1] or len(W_enc) % self.experts:
            raise InputError(
                f"{where}: W_enc has shape {list(W_enc.shape)}, needs width {self.W_router.shape[1]} and a multiple of "
                f"{self.experts} features to fit W_router {list(self.W_router.shape)}"
            )
        if isinstance(activation, TopK) and activation.k > len(W_enc) // self.experts:
            raise InputError(
                f"{where}: TopK keeps {activation.k} features, more than the {len(W_enc) // self.experts} of an expert"
            )


class Kronecker(Encoding):
    """A feature a pair of rows: `a_hij = act(mAND(p_hi, q_hj))`.

    `mAND(p, q) = sqrt(p q)` where both are positive, else 0.
    Head h has m rows `p_hi` and n rows `q_hj`, which make m n features (Kurochkin et al. 2025, "Train Sparse
    Autoencoders Efficiently by Utilizing Features Correlation"). W_enc holds all p_1 (one a head), .., p_m, then q_1,
    .., q_n; feature (h, i, j) is number `(h m + i) n + j`. mAND is homogeneous of degree 1, so by Euler's theorem the
    gradient `sqrt(q/p) w_p / 2 + sqrt(p/q) w_q / 2` is the encoder row, and gives the activation exactly at x.
    """

    name = "kronecker"

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        for name, value in (("m", m), ("n", n)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"kronecker({name}={value!r}): needs a whole number of rows a head, at least 1")
        self.m, self.n = m, n

    def n_features(self, n_rows: int) -> int:
        return n_rows // (self.m + self.n) * self.m * self.n

    def pair(self, features: Int[Tensor, " n"], n_rows: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The two rows of each listed feature."""
        heads = n_rows // (self.m + self.n)
        head, inside = features // (self.m * self.n), features % (self.m * self.n)
        return inside // self.n * heads + head, (self.m + inside % self.n) * heads + head

    def all_pairs(
        self, pre: Float[Tensor, "... rows"]
    ) -> tuple[Float[Tensor, "... h m 1"], Float[Tensor, "... h 1 n"]]:
        """p and q of every head, ready to be multiplied into its features."""
        by_head = pre.unflatten(-1, (self.m + self.n, -1)).transpose(-1, -2)  # [..., heads, m + n]
        return by_head[..., : self.m, None], by_head[..., None, self.m :]

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, activation: Activation) -> Float[Tensor, "... n"]:
        p, q = self.all_pairs(torch.relu(pre_activations(x, W_enc, b_enc)))
        product = (p * q).flatten(-3)
        both = product > 0
        return activation(torch.where(both, product, 1.0).sqrt() * both)  # never the root of 0: it has no gradient

    def rows(self, features: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.pair(features, len(W_enc))
        of_p, of_q = W_enc[first].to(x.dtype), W_enc[second].to(x.dtype)
        p, q = (of_p * x).sum(-1) + b_enc[first], (of_q * x).sum(-1) + b_enc[second]
        both = (p > 0) & (q > 0)
        ratio = torch.where(both, q, 1.0).sqrt() / torch.where(both, p, 1.0).sqrt()
        to_p, to_q = 0.5 * ratio * both, 0.5 / ratio * both
        return (
            to_p[:, None] * of_p + to_q[:, None] * of_q,
            to_p * b_enc[first] + to_q * b_enc[second],
        )

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "m": self.m, "n": self.n}

    def require_fit(self, W_enc: Tensor, activation: Activation, where: str) -> None:
        if len(W_enc) % (self.m + self.n):
            raise InputError(f"{where}: {len(W_enc)} encoder rows, needs a multiple of m + n = {self.m + self.n}")


LINEAR = Linear()
"""The encoding of every dictionary that is given no other."""


def build_encoding(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Encoding:
    """The encoding that `settings` (as from `Encoding.settings`) and stored tensors describe."""
    name = settings.get("name")
    if name == Linear.name:
        return LINEAR
    if name == Switch.name:
        if missing := [name for name in ("W_router", "b_router") if name not in tensors]:
            raise InputError(f"{where}: a switch encoder needs a tensor {missing[0]}")
        return Switch(tensors["W_router"], tensors["b_router"])
    if name == Kronecker.name:
        return Kronecker(settings.get("m", 0), settings.get("n", 0))
    raise InputError(f"{where}: encoder {name!r} is not known; known: linear, switch, kronecker")
