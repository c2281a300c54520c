"""One row of the training benchmark: this project's trainer on given activations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measure import Activations, arguments, measure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from replacement.training import Plan, TrainingConfig, train
from replacement.training.kinds import sites

READ, WRITE = "blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out"
RATE = 8e-3  # short runs want a high one


class Source:
    """The file's batches by the names of the hooks that a kind has to do with."""

    def __init__(self, activations: Activations, plan: Plan) -> None:
        self.activations, self.sites = activations, sites([plan])

    def batch(self, index: int) -> dict[str, Tensor]:
        """One batch of the file."""
        both = dict(zip((READ, WRITE), self.activations.batch(index), strict=True))
        return {name: both[name] for name in self.sites}


def run(options: argparse.Namespace, activations: Activations):
    """The dictionary, trained; `options.kind` is a kind and a sparsity, as in `sae:topk`."""
    kind, sparsity = options.kind.split(":")
    config = TrainingConfig(
        kind=kind,
        sparsity=sparsity,
        n_features=options.features,
        k=options.k,
        batch_tokens=options.batch_tokens,
        tokens=options.steps * options.batch_tokens,
        buffer_bytes=1,  # one batch at a time, in the file's order
        learning_rate=options.learning_rate or RATE,
        betas=(0.5, 0.95),
        warmup_steps=options.steps // 20,
    )
    plan = Plan(0, (READ,), (READ,) if kind == "sae" else (WRITE,), kind == "skip_transcoder")
    (dictionary,) = train(Source(activations, plan), [plan], config=config, show_progress=False).dictionaries()

    def approximate(x: Tensor) -> tuple[Tensor, float]:
        features = dictionary.encode(x)
        return dictionary(x), float((features != 0).sum() / len(x))

    return approximate


if __name__ == "__main__":
    given = arguments()
    measure(given, lambda activations: run(given, activations), target=int(not given.kind.startswith("sae")))
