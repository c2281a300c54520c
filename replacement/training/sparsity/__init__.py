"""How features are kept few, by name; a new sparsity is a class and a row here."""

from __future__ import annotations

from replacement.training.config import TrainingConfig
from replacement.training.parallel import Mesh
from replacement.training.sparsity.base import Encoder, Exported, Penalised, Sparsity, norms_of
from replacement.training.sparsity.penalties import GatedSparsity, JumpReLUSparsity, ReLUSparsity
from replacement.training.sparsity.topk import BatchTopKSparsity, TopKSparsity

__all__ = ["BY_NAME", "Encoder", "Exported", "GatedSparsity", "Penalised", "Sparsity", "norms_of", "sparsity"]

BY_NAME: dict[str, type[Sparsity]] = {
    "batchtopk": BatchTopKSparsity,
    "topk": TopKSparsity,
    "relu": ReLUSparsity,
    "jumprelu": JumpReLUSparsity,
    "gated": GatedSparsity,
}


def sparsity(config: TrainingConfig, mesh: Mesh) -> Sparsity:
    """The sparsity that a config names, with k features a token, for the features that this process holds."""
    return BY_NAME[config.sparsity](config, mesh)
