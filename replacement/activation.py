"""Activation functions of dictionaries: from pre-activations to sparse activations.

Every one of them is the identity on its active set, which is what makes a dictionary affine there: an active feature's
activation *is* its pre-activation. Knows nothing of sites, layers or weights other than its own thresholds.
"""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor, nn

from replacement.errors import InputError


class Activation(nn.Module, abc.ABC):
    """From pre-activations to activations, zero off the active set.

    Law: `activation(pre)[i] in (0, pre[i])` for every feature i, so the map is the identity where it is not zero.
    """

    name: str

    @abc.abstractmethod
    def forward(self, pre: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        """Activations of the same shape as the pre-activations."""

    def settings(self) -> dict[str, int | float | str]:
        """What a config file needs beside the tensors to build this again."""
        return {"name": self.name}

    def require_width(self, n_features: int, where: str) -> None:
        """Raise InputError, which begins with `where`, unless the function's own tensors fit that many features."""
        return None


class ReLU(Activation):
    """`max(pre, 0)`."""

    name = "relu"

    def forward(self, pre: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        return torch.relu(pre)


class TopK(Activation):
    """The k largest pre-activations of each token as they are, also where they are negative (Gao et al. 2024 without
    ReLU)."""

    name = "topk"

    def __init__(self, k: int) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"TopK(k={k!r}): needs a whole number of features a token, at least 1")
        self.k = k

    def forward(self, pre: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        values, indices = pre.topk(min(self.k, pre.shape[-1]), dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values)

    def settings(self) -> dict[str, int | float | str]:
        return {"name": self.name, "k": self.k}


class JumpReLU(Activation):
    """`pre * (pre > threshold)`, one threshold a feature, strict, the value not shifted (Rajamanoharan et al. 2024)."""

    name = "jumprelu"
    threshold: Tensor  # [n_features], or [] for one threshold that all features share

    def __init__(self, threshold: Float[Tensor, "*n_features"]) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Float[Tensor, "... n_features"]) -> Float[Tensor, "... n_features"]:
        return pre * (pre > self.threshold)

    def require_width(self, n_features: int, where: str) -> None:
        shape = tuple(self.threshold.shape)
        if shape not in ((), (1,), (n_features,)):
            raise InputError(f"{where}: threshold has shape {list(shape)}, needs [{n_features}], or [] for one shared")


class BatchTopK(JumpReLU):
    """BatchTopK at inference: one threshold for all features, learned while training kept `k` a token on average.

    Bussmann et al. 2024. The choice over a whole batch is the trainer's; a single prompt has no batch to choose from.
    """

    name = "batchtopk"

    def __init__(self, threshold: Float[Tensor, ""], k: int) -> None:
        super().__init__(threshold)
        self.k = k

    def settings(self) -> dict[str, int | float | str]:
        return {"name": self.name, "k": self.k}


def build_activation(settings: dict, threshold: Float[Tensor, "*n_features"] | None) -> Activation:
    """The activation that `settings` (as from `Activation.settings`) and a stored threshold describe."""
    name = settings.get("name")
    if name == ReLU.name:
        return ReLU()
    if name == TopK.name:
        return TopK(settings.get("k", 0))
    if name in (JumpReLU.name, BatchTopK.name):
        if threshold is None:
            raise InputError(f"activation {name!r} needs a tensor `threshold`, and the file holds none")
        return JumpReLU(threshold) if name == JumpReLU.name else BatchTopK(threshold, settings.get("k", 0))
    raise InputError(f"activation {name!r} is not known; known: relu, topk, batchtopk, jumprelu")
