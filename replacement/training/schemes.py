"""How features are made of encoder rows while they are trained, by name: linear, switch, kronecker.

The trained counterpart of `replacement.encoding`: the same maps, with the choice of what fires, gradients over active
entries, and losses of their own. Knows nothing of decoders, sparsities or optimisers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from replacement.encoding import LINEAR, Encoding, Kronecker, Switch
from replacement.training.clusters import Detectors, k_means
from replacement.training.config import TrainingConfig
from replacement.training.parallel import Axis
from replacement.training.sparse import (
    ActiveSet,
    active_at,
    dense_pairs,
    encode_active,
    encode_pairs,
    in_order,
    pairs_above,
    pairs_top,
    select_above,
    select_top,
)

_CONFIDENCE = 16.0  # of a router at the start: a token at the usual distance from its centre has logit -8


class Scheme(nn.Module, abc.ABC):
    """From encoder rows to pre-activations of features, on scaled inputs.

    All but the linear one need all features in one process; tokens may be shared.

    Law: for what `above` or `top` choose, `values` and `dense` agree, and times `weight` they are what the exported
    encoding gives.
    """

    shares_rows = False
    """Whether several features are made of one row, so that no feature can be scaled by itself."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.n_features = config.width

    @property
    def n_rows(self) -> int:
        """Encoder rows that make the features."""
        return self.n_features

    def prepare(self, rows: Detectors, x: Float[Tensor, "tokens d_in"], generator: torch.Generator) -> Detectors:
        """From one detector a row, on a sample of scaled inputs, to encoder rows and one decoder row a feature."""
        return rows

    @abc.abstractmethod
    def above(
        self, x: Float[Tensor, "tokens d_in"], W_enc: Tensor, b_enc: Tensor, levels: Float[Tensor, " n_features"]
    ) -> ActiveSet:
        """Features whose pre-activation is above their (positive) level."""

    @abc.abstractmethod
    def top(self, x: Float[Tensor, "tokens d_in"], W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveSet:
        """The k features of each token with the largest pre-activations."""

    def values(
        self, x: Float[Tensor, "tokens d_in"], W_enc: Tensor, b_enc: Tensor, active: ActiveSet
    ) -> Float[Tensor, " entries"]:
        """Pre-activations of active features, chosen of these tensors or without their pre-activations; gradients flow
        to all tensors."""
        return encode_active(x, W_enc, b_enc, active, active.pre)

    def dense(
        self,
        x: Float[Tensor, "tokens d_in"],
        W_enc: Tensor,
        b_enc: Tensor,
        features: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "tokens n"]:
        """Pre-activations of the listed features (None: all) at every token; for few tokens or few features."""
        return F.linear(x, W_enc, b_enc) if features is None else F.linear(x, W_enc[features], b_enc[features])

    def weight(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " tokens"] | None:
        """What all activations of a token are multiplied by; None for 1."""
        return None

    def extra_loss(self, x: Float[Tensor, "tokens d_in"], data: Axis) -> Tensor | float:
        """A loss of its own, weighted; data: processes that see the batch's other tokens."""
        return 0.0

    def export(self, into: Float[Tensor, " d_in"]) -> Encoding:
        """The finished encoding, on inputs that have yet to be multiplied by `into`."""
        return LINEAR


class LinearScheme(Scheme):
    """One feature a row."""

    def above(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, levels: Tensor) -> ActiveSet:
        return select_above(x, W_enc, b_enc, levels)

    def top(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveSet:
        return select_top(x, W_enc, b_enc, k)


class SwitchScheme(Scheme):
    """One expert a token, chosen by a router; only its rows are multiplied (Mudide et al. 2024).

    What it writes is scaled by the router's probability of that expert, from which the router learns. Its own loss
    keeps experts evenly used: `experts * sum over e of f_e P_e`, f_e the share of tokens that go to e and P_e the mean
    probability of e (Fedus et al. 2021, the paper's `L_aux`); at 1 when all are used alike.
    """

    def __init__(self, config: TrainingConfig, d_in: int) -> None:
        super().__init__(config)
        self.balance_weight, self.size = config.balance_weight, config.width // config.experts
        self.map = Switch(torch.zeros(config.experts, d_in), torch.zeros(config.experts))

    def prepare(self, rows: Detectors, x: Tensor, generator: torch.Generator) -> Detectors:
        """A router that knows clusters of tokens (k-means): it learns slowly, from the chosen expert's errors alone.

        Logits are `-beta |x - c_e|^2 / 2`, less what is the same for all; decoder rows make up for probabilities
        below 1.
        """
        with torch.no_grad():
            label = k_means(x.cpu(), n=self.map.experts, generator=generator).to(x.device)
            size = torch.bincount(label, minlength=self.map.experts)[:, None]
            centres = torch.zeros_like(self.map.W_router).index_add_(0, label, x) / size.clamp_min(1)
            beta = _CONFIDENCE / (x - centres[label]).pow(2).sum(1).mean().clamp_min(1e-6)
            self.map.W_router.copy_(beta * centres)
            self.map.b_router.copy_(-0.5 * beta * centres.pow(2).sum(1))
            return rows._replace(W_dec=rows.W_dec / self.map.route(x).probability.mean())

    def above(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, levels: Tensor) -> ActiveSet:
        return self._by_expert(x, lambda at, own: select_above(x[at], W_enc[own], b_enc[own], levels[own]))

    def top(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveSet:
        return self._by_expert(x, lambda at, own: select_top(x[at], W_enc[own], b_enc[own], k))

    @torch.no_grad()
    def _by_expert(self, x: Tensor, choose: Callable[[Tensor, slice], ActiveSet]) -> ActiveSet:
        expert, found = self.map.route(x).expert, [torch.empty(0, dtype=torch.long, device=x.device)]
        by_expert = expert.sort(stable=True).indices
        for index, at in enumerate(by_expert.split(torch.bincount(expert, minlength=self.map.experts).tolist())):
            if len(at):
                one = choose(at, slice(index * self.size, (index + 1) * self.size))
                found.append(at[one.token] * self.n_features + one.feature + index * self.size)
        return active_at(in_order(found, len(x) * self.n_features), len(x), self.n_features)

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor | None = None) -> Tensor:
        expert = torch.arange(self.n_features, device=x.device) if features is None else features
        chosen = expert // self.size == self.map.route(x).expert[:, None]
        return super().dense(x, W_enc, b_enc, features) * chosen

    def weight(self, x: Tensor) -> Tensor:
        return self.map.route(x).probability

    def extra_loss(self, x: Tensor, data: Axis) -> Tensor | float:
        probabilities = self.map.probabilities(x)
        share = data.average(torch.bincount(probabilities.argmax(1), minlength=self.map.experts) / len(x))
        return self.balance_weight * self.map.experts * (share * probabilities.mean(0)).sum()

    def export(self, into: Tensor) -> Encoding:
        return Switch(self.map.W_router.detach() * into, self.map.b_router.detach().clone())


class KroneckerScheme(Scheme):
    """A feature a pair of rows of one head: few rows make many features (Kurochkin et al. 2025)."""

    shares_rows = True

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        self.map = Kronecker(*config.pairs)

    @property
    def n_rows(self) -> int:
        return self.n_features // (self.map.m * self.map.n) * (self.map.m + self.map.n)

    def prepare(self, rows: Detectors, x: Tensor, generator: torch.Generator) -> Detectors:
        """A feature starts to write what its two rows' detectors write, at the same length."""
        first, second = self.map.pair(torch.arange(self.n_features, device=x.device), self.n_rows)
        both = F.normalize(rows.W_dec[first] + rows.W_dec[second], dim=1)
        return rows._replace(W_dec=both * rows.W_dec.norm(dim=1).mean())

    def above(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, levels: Tensor) -> ActiveSet:
        return pairs_above(x, W_enc, b_enc, levels, self.map)

    def top(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> ActiveSet:
        return pairs_top(x, W_enc, b_enc, k, self.map)

    def values(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: ActiveSet) -> Tensor:
        return encode_pairs(x, W_enc, b_enc, active, self.map)

    def dense(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, features: Tensor | None = None) -> Tensor:
        return dense_pairs(x, W_enc, b_enc, features, self.map)

    def export(self, into: Tensor) -> Encoding:
        return Kronecker(self.map.m, self.map.n)


def scheme(config: TrainingConfig, d_in: int) -> Scheme:
    """The scheme that a config names, for inputs of that width."""
    if config.encoder == "switch":
        return SwitchScheme(config, d_in)
    return KroneckerScheme(config) if config.encoder == "kronecker" else LinearScheme(config)
