"""One row of the training benchmark: EleutherAI's sparsify, with the steps of its trainer on given activations.

Its trainer takes a model and a data set, so the loop is written out here, with its own coder, optimisers and rates.
"""

from __future__ import annotations

import argparse

import torch
from measure import Activations, arguments, measure
from sparsify import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder

KINDS = ("sae_signum", "sae_adam", "skip_transcoder_signum", "skip_transcoder_adam")
ADAM = 1e-3  # its default rate and 1,000 steps of warm-up leave Adam far behind in a short run
WARMUP = 0.05


def optimizer_of(kind: str, coder: SparseCoder, rate: float | None, steps: int):
    """The optimiser and, for Adam, its schedule."""
    if kind.endswith("signum"):
        from schedulefree import ScheduleFreeWrapper

        rate = rate or 5e-3 / (coder.num_latents / 2**14) ** 0.5
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
        optimizer.train()
        return optimizer, None
    from transformers import get_linear_schedule_with_warmup

    adam = torch.optim.Adam(coder.parameters(), lr=rate or ADAM)
    return adam, get_linear_schedule_with_warmup(adam, int(WARMUP * steps), steps)


def train(options: argparse.Namespace, activations: Activations):
    """Its coder, trained."""
    transcodes = options.kind.startswith("skip")
    config = SparseCoderConfig(
        num_latents=options.features, k=options.k, skip_connection=transcodes, transcode=transcodes
    )
    coder = SparseCoder(options.width, config)
    optimizer, schedule = optimizer_of(options.kind, coder, options.learning_rate, options.steps)
    since_fired = torch.zeros(options.features, dtype=torch.long)
    for step in range(options.steps):
        x, y = activations.batch(step)
        y = y if transcodes else x
        if step == 0:
            if transcodes:
                coder.encoder.bias.data = -x.mean(0) @ coder.encoder.weight.data.T
            coder.b_dec.data = y.mean(0)
        if not transcodes:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x=x, y=y, total_variance=(y - y.mean(0)).pow(2).sum())
        since_fired += len(x)
        since_fired[out.latent_indices.flatten()] = 0
        out.fvu.backward()
        if not transcodes:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    if schedule is None:
        optimizer.eval()  # the averaged weights are what it saves
    return lambda x: (coder(x).sae_out, float(options.k))


if __name__ == "__main__":
    given = arguments()
    measure(given, lambda activations: train(given, activations), target=int(given.kind.startswith("skip")))
