"""Losses and gradients of every kind and sparsity in training: those of dense products and the papers' estimators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from replacement.training import Trainee, TrainingConfig, plans
from replacement.training.config import KINDS, PENALISED
from replacement.training.kinds import sites
from tests import dense

N_LAYERS, WIDTH, TOKENS, CLEAR = 2, 10, 1500, 0.05
SPARSE = {
    "batchtopk": {"sparsity": "batchtopk"},
    "floor": {"sparsity": "batchtopk", "floor": 0.4},
    "topk": {"sparsity": "topk"},
    "relu": {"sparsity": "relu"},
    "jumprelu": {"sparsity": "jumprelu", "penalty": "tanh", "bandwidth": 0.4},
    "quadratic": {"sparsity": "jumprelu", "penalty": "quadratic", "bandwidth": 0.4},
    "gated": {"sparsity": "gated"},
}


def scrambled(kind: str, sparse: str) -> tuple[Trainee, dict[str, Tensor]]:
    """Dictionaries none of whose parameters is at a special value, and activations."""
    config = TrainingConfig(
        kind=kind, n_features=24, k=4, prefixes=(8,), dead_weight=0.0, tokens=4096, **SPARSE[sparse]
    )
    planned, generator = plans(config, N_LAYERS), torch.Generator().manual_seed(3)
    batch = {name: (2 + i) * torch.randn(TOKENS, WIDTH, generator=generator) for i, name in enumerate(sites(planned))}
    trainee = Trainee(planned, batch, config)
    with torch.no_grad():
        for name, p in trainee.named_parameters():
            p += (0.15 if p.ndim > 1 else 0.3) * torch.randn(p.shape, generator=generator)
            if name.endswith("threshold"):
                p.copy_(0.3 + 0.5 * torch.rand(p.shape, generator=generator))
        for coder in trainee:
            if config.sparsity == "batchtopk":  # remembered, as from earlier steps
                coder.sparsity.threshold.fill_(0.6)
                coder.sparsity.peak.copy_(1 + 3 * torch.rand(24, generator=generator))
    return trainee, batch


def levels(trainee: Trainee) -> list[Tensor]:
    """Where each feature's gradients begin: above it they are computed, and by how much is known in bfloat16 only."""
    found = []
    for coder in trainee:
        one, norms = coder.sparsity, coder.W_dec.detach().double().flatten(1).norm(dim=1)
        if trainee.config.sparsity == "batchtopk":
            found.append(torch.maximum(one.threshold.double() / norms, trainee.config.floor * one.peak.double()))
        elif trainee.config.sparsity == "jumprelu":
            found.append(one.threshold.detach().double() - trainee.config.bandwidth / 2)
        else:
            found.append(torch.zeros_like(norms))
    return found


def clear(trainee: Trainee, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens at which no feature is so close to its level that bfloat16 could take it for the other side."""
    keep = torch.ones(TOKENS, dtype=torch.bool)
    for coder, level in zip(trainee, levels(trainee), strict=True):
        pre = trainee.read(coder, batch) @ coder.W_enc.T + coder.b_enc
        keep &= ((pre - level).abs() > CLEAR * (1 + level.abs())).all(1)
    assert keep.sum() > 50
    return {name: tensor[keep] for name, tensor in batch.items()}


def both(kind: str, sparse: str, part: int) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The two losses, the trainer's and the dense one, and gradients; part: 0 for reconstruction, 1 for penalty."""
    trainee, sample = scrambled(kind, sparse)
    batch, scale, leaf = clear(trainee, sample), dense.scales(sample), dense.leaves(trainee)
    scaled = {name: tensor.double() * scale[name] for name, tensor in batch.items()}
    theirs = dense.losses(trainee.config, list(trainee.planned), leaf, scaled, levels(trainee))[part]
    found = trainee(batch, generator=torch.Generator().manual_seed(0), memory=1.0)
    ours = torch.as_tensor((found.reconstruction, found.penalty)[part])
    parameters = dict(trainee.named_parameters())
    assert list(parameters) == list(leaf)
    options = {"allow_unused": True, "materialize_grads": True}
    fast = torch.autograd.grad(ours, list(parameters.values()), **options)
    slow = torch.autograd.grad(theirs, list(leaf.values()), **options)
    pairs = zip(leaf, zip(fast, slow, strict=True), strict=True)
    return ours, theirs, dict(pairs)


def assert_same(ours: Tensor, theirs: Tensor, gradients: dict[str, tuple[Tensor, Tensor]]) -> None:
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)
    for name, (a, b) in gradients.items():
        atol, words = 1e-5 * float(b.abs().max()) + 1e-9, f"{name}: {{}}"
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=atol, msg=words.format)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", SPARSE)
def test_reconstruction_and_its_gradients_equal_those_of_dense_products(kind: str, sparse: str) -> None:
    """With nested prefixes; with respect to rows, biases, skips, thresholds and magnitudes, and none is left out."""
    *losses, gradients = both(kind, sparse, 0)
    assert all(slow.any() for _, slow in gradients.values())
    assert_same(*losses, gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [name for name, settings in SPARSE.items() if settings["sparsity"] in PENALISED])
def test_penalties_and_their_gradients_equal_those_of_the_papers(kind: str, sparse: str) -> None:
    """Of all activations (of a gate, not of magnitudes), with the norms of decoder rows in it or held as the paper
    says, and with the controller's first weight.
    """
    *losses, gradients = both(kind, sparse, 1)
    assert all(slow.any() for name, (_, slow) in gradients.items() if name.endswith(("W_enc", "b_enc", "threshold")))
    assert_same(*losses, gradients)
