"""Training of transcoders: a reconstruction stage for all layers at once, then an end-to-end stage."""

from replacement.training.config import EndToEndConfig, TrainingConfig
from replacement.training.end_to_end import ReplaceableModel, TokenBatch, train_end_to_end
from replacement.training.layer import TrainedLayer
from replacement.training.reconstruction import train
from replacement.training.source import Activations, ActivationSource

__all__ = [
    "ActivationSource",
    "Activations",
    "EndToEndConfig",
    "ReplaceableModel",
    "TokenBatch",
    "TrainedLayer",
    "TrainingConfig",
    "train",
    "train_end_to_end",
]
