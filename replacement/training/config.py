"""Settings of dictionary training: one object for the reconstruction stage, one for the end-to-end stage.

Says what the numbers mean and which contradict each other; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from replacement.errors import InputError


@dataclass(frozen=True)
class TrainingConfig:
    """Reconstruction stage: every layer's transcoder learns its MLP from one stream of activations."""

    n_features: int = 2048
    """Features a layer; a multiple of 8."""
    k: int | tuple[int, ...] = 16
    """Features that fire at a token on average (BatchTopK), for all layers or one number a layer."""
    floor: float = 0.0
    """A feature fires only above this share of its own usual peak, so not faintly off its topic; 0 for no floor."""
    prefixes: tuple[int, ...] = ()
    """Sizes of nested dictionaries that must each reconstruct (Matryoshka), ascending, all below n_features; () for
    none.
    """
    skip: bool = False
    """Whether each transcoder has a linear skip connection."""
    tokens: int = 4_000_000
    """Tokens to train on."""
    batch_tokens: int = 4096
    """Tokens of one step, drawn from a shuffled block."""
    block_batches: int = 8
    """Source batches that are concatenated and shuffled together: the bound on the buffer's memory."""
    learning_rate: float = 2e-3
    """Adam's step size at its peak."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    decay_fraction: float = 0.4
    """Share of the run, at its end, over which the learning rate falls to zero."""
    aux_weight: float = 1 / 8
    """Weight of AuxK: dead features rebuild what the live ones missed (Gao et al. 2024, appendix A.2)."""
    aux_k: int = 32
    """Dead features that take part at a token."""
    dead_after: int = 100_000
    """Tokens without firing after which a feature counts as dead in training."""
    threshold_memory: float = 0.9
    """Share of the old threshold that stays at a step."""
    seed: int = 0
    """Seed of initialisation, shuffling and sampling."""

    def __post_init__(self) -> None:
        if self.n_features < 8 or self.n_features % 8:
            raise InputError(f"TrainingConfig(n_features={self.n_features}): needs a positive multiple of 8")
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < p < self.n_features for p in self.prefixes):
            raise InputError(
                f"TrainingConfig(prefixes={self.prefixes}): needs ascending sizes in 1..{self.n_features - 1}; "
                "leave n_features itself out"
            )
        if any(not 0 < k <= self.n_features for k in (self.k if isinstance(self.k, tuple) else (self.k,))):
            raise InputError(f"TrainingConfig(k={self.k}): needs between 1 and n_features = {self.n_features}")
        if not 0 <= self.floor < 1:
            raise InputError(f"TrainingConfig(floor={self.floor}): must be in [0, 1); for 20 percent pass 0.2")
        if self.tokens < self.batch_tokens:
            raise InputError(f"TrainingConfig(tokens={self.tokens}): less than one batch of {self.batch_tokens} tokens")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    def k_of(self, layer: int, n_layers: int) -> int:
        """k of one layer; raises `InputError` when a tuple's length is not the number of layers."""
        if isinstance(self.k, int):
            return self.k
        if len(self.k) != n_layers:
            raise InputError(
                f"TrainingConfig(k={self.k}): {len(self.k)} numbers for {n_layers} layers; give one a layer"
            )
        return self.k[layer]


@dataclass(frozen=True)
class EndToEndConfig:
    """End-to-end stage: the fully replaced model learns the original's next-token distribution."""

    steps: int = 400
    """Optimiser steps."""
    documents: int = 32
    """Documents of one step."""
    learning_rate: float = 5e-4
    """Adam's step size at its peak; it falls linearly to zero."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    kl_weight: float = 1.0
    """Weight of KL(original || replaced) per token."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction error against the original model's MLP outputs, mean over layers and nested
    prefixes.
    """
    other_share: float = 0.15
    """Share of the tokens that are not answers, drawn anew each step, that take part in the KL beside all answers."""
    aux_weight: float = 1 / 8
    """Weight of AuxK, as in the reconstruction stage."""
    threshold_memory: float = 0.98
    """Share of the old threshold that stays at a step."""
    layers: tuple[int, ...] = ()
    """Layers that learn in this stage; () for all."""
    widen: float = 0.0
    """Added to the encoder biases of those layers at the start, in scaled units; above 0 it also ends their floor."""
    k: int | None = None
    """New k of those layers; None to keep theirs."""
    input_noise: float = 0.0
    """Standard deviation of noise on the scaled inputs of those layers: makes features fire for the unfamiliar too."""
    seed: int = 1
    """Seed of sampling."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.documents < 1:
            raise InputError(
                f"EndToEndConfig(steps={self.steps}, documents={self.documents}): needs steps >= 0 and documents >= 1"
            )
        if self.widen < 0 or self.input_noise < 0 or (self.k is not None and self.k < 1):
            raise InputError(
                f"EndToEndConfig(widen={self.widen}, input_noise={self.input_noise}, k={self.k}): "
                "needs widen and input_noise >= 0 and k >= 1"
            )
