"""Training of dictionaries: a reconstruction stage for all of them at once, then an end-to-end stage."""

from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.end_to_end import ReplaceableModel, TokenBatch, train_end_to_end
from replacement.training.kinds import Plan, plans
from replacement.training.reconstruction import train
from replacement.training.source import Activations, ActivationSource
from replacement.training.trainee import Trainee

__all__ = [
    "ActivationSource",
    "Activations",
    "EndToEndConfig",
    "Plan",
    "ReplaceableModel",
    "TokenBatch",
    "Trainee",
    "TrainingConfig",
    "plans",
    "train",
    "train_end_to_end",
]
