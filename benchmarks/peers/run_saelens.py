"""One row of the training benchmark: SAELens, by its own trainer on given activations."""

from __future__ import annotations

import argparse
import contextlib
import io

import torch
from measure import Activations, arguments, measure
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig

RATE = 1e-3


def sae_of(kind: str, width: int, features: int, k: int):
    """Its SAE of a kind, with its own defaults but for the wanted L0."""
    if kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=features, k=k))
    if kind == "batchtopk":
        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=width, d_sae=features, k=k))
    config = JumpReLUTrainingSAEConfig(
        d_in=width,
        d_sae=features,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=k,
        jumprelu_bandwidth=2.0,
        jumprelu_init_threshold=0.1,
        normalize_activations="none",
    )
    return JumpReLUTrainingSAE(config)


def train(options: argparse.Namespace, activations: Activations):
    """Its SAE, trained."""
    sae = sae_of(options.kind, options.width, options.features, options.k)
    config = SAETrainerConfig(
        total_training_samples=options.steps * options.batch_tokens,
        train_batch_size_samples=options.batch_tokens,
        lr=options.learning_rate or RATE,
        lr_warm_up_steps=options.steps // 20,
        lr_decay_steps=options.steps // 5,
        lr_end=0.0,
    )
    trainer = SAETrainer(config, sae, (x for x, _ in activations))
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.fit()
    sae.eval()

    def approximate(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        features = sae.encode(x)
        features = features.to_dense() if features.is_sparse else features
        return sae.decode(features), float((features != 0).sum() / len(x))

    return approximate


if __name__ == "__main__":
    given = arguments()
    measure(given, lambda activations: train(given, activations), target=0)
