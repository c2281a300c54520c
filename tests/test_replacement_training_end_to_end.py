"""Laws of the end-to-end stage: of every kind, divergences and their gradients are those of a dense replaced model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor

from replacement.training import EndToEndConfig, TokenBatch, Trainee, TrainingConfig, plans, train_end_to_end
from replacement.training.config import KINDS
from replacement.training.kinds import MLP_IN, MLP_OUT, hook, sites
from replacement.training.report import Record
from tests import dense

WIDTH, N_LAYERS, VOCABULARY = 8, 2, 12
TOKENS = torch.randint(VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(4))
WHERE = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(5)) < 0.5
Written = Callable[[str, Tensor], Tensor | None]


class SmallModel:
    """A residual stream of MLPs, in float64 inside; any hook can be read and written."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.embed, self.unembed = draw(VOCABULARY, WIDTH), draw(WIDTH, VOCABULARY) / 2
        self.up, self.down = draw(N_LAYERS, WIDTH, 4 * WIDTH) / 2, draw(N_LAYERS, 4 * WIDTH, WIDTH) / 3

    def logits(self, visit: Written) -> Tensor:
        """At the chosen positions; `visit` sees the value of every hook and may return another."""

        def put(name: str, value: Tensor) -> Tensor:
            written = visit(name, value)
            return value if written is None else written.double()

        x = self.embed[TOKENS]
        for layer in range(N_LAYERS):
            inside = put(hook(layer, MLP_IN), x)
            x = x + put(hook(layer, MLP_OUT), (inside @ self.up[layer]).tanh() @ self.down[layer])
        return x[WHERE] @ self.unembed

    def replaced(self, tokens, where, replacement):
        assert torch.equal(tokens, TOKENS) and torch.equal(where, WHERE)

        def visit(name: str, value: Tensor) -> Tensor | None:
            replacement.read(name, value)
            return replacement.write(name)

        return self.logits(visit)

    def original(self, tokens, where):
        found: dict[str, Tensor] = {}
        logits = self.logits(lambda name, value: found.__setitem__(name, value.flatten(0, 1)))
        return logits, found


class DenseReplacement:
    """TopK dictionaries in the model's place, written densely; some written hooks keep the model's values."""

    def __init__(self, trainee: Trainee, leaf: Mapping[str, Tensor], original: Mapping[str, Tensor], kept) -> None:
        self.trainee, self.leaf, self.kept, self.parts = trainee, leaf, kept, dict[str, Tensor]()
        self.scale = dense.scales({name: original[name] for name in trainee.sites})
        for index, plan in enumerate(trainee.planned):
            if len(plan.reads) > 1:
                self.run(index, torch.cat([original[name] * self.scale[name] for name in plan.reads], 1))

    def run(self, index: int, x: Tensor) -> None:
        plan, of = self.trainee.planned[index], dense.coder_of(self.leaf, index)
        activations = dense.fired(self.trainee.config, of, x).activations
        for j, name in enumerate(plan.writes):
            out = activations @ of["W_dec"][:, j] + (x @ of["W_skip"].T if plan.skip else 0.0)
            self.parts[name] = self.parts.get(name, 0.0) + out

    def __call__(self, name: str, value: Tensor) -> Tensor | None:
        for index, plan in enumerate(self.trainee.planned):
            if plan.reads == (name,):
                self.run(index, value.flatten(0, 1) * self.scale[name])
        written = self.trainee.written
        if name in self.kept or name not in written:
            return None
        out = self.parts[name] + self.leaf[f"b_dec.{written.index(name)}"]
        return (out / self.scale[name]).view_as(value)


def untrained(kind: str) -> tuple[SmallModel, Trainee]:
    """Dictionaries with random numbers in all their parameters."""
    site = MLP_OUT if kind in ("sae", "crosscoder", "causal_crosscoder") else "hook_resid_post"
    config = TrainingConfig(kind=kind, site=site, sparsity="topk", n_features=32, k=3, tokens=4096)
    planned, model, generator = plans(config, N_LAYERS), SmallModel(), torch.Generator().manual_seed(3)
    sample = model.original(TOKENS, WHERE)[1]
    trainee = Trainee(planned, {name: sample[name] for name in sites(planned)}, config)
    with torch.no_grad():
        for p in trainee.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)
    return model, trainee


def one_step(model: SmallModel, trainee: Trainee, **weights: object) -> Record:
    """A step of length zero, whose gradients stay to be seen, with no loss but those that are given weights."""
    records: list[Record] = []
    settings = {"kl_weight": 0.0, "reconstruction_weight": 0.0, "aux_weight": 0.0, "learning_rate": 0.0}
    config = EndToEndConfig(**{**settings, "steps": 1, "other_share": 0.0, **weights})
    batch = TokenBatch(TOKENS, WHERE)
    train_end_to_end(model, trainee, lambda _: batch, config=config, listeners=[records.append], show_progress=False)
    return records[0]


def divergence(model: SmallModel, trainee: Trainee, kept=()) -> tuple[float, dict[str, Tensor]]:
    """KL(original || replaced), the mean over chosen positions, and its gradients."""
    wanted, original = model.original(TOKENS, WHERE)
    leaf = dense.leaves(trainee)
    got = model.logits(DenseReplacement(trainee, leaf, original, kept)).log_softmax(-1)
    kl = (wanted.softmax(-1) * (wanted.log_softmax(-1) - got)).sum(-1).mean()
    kl = kl + 0.0 * sum(each.sum() for each in leaf.values())  # where all is kept there is no other way to them
    return kl.item(), dict(zip(leaf, torch.autograd.grad(kl, list(leaf.values())), strict=True))


def assert_gradients(trainee: Trainee, gradients: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
    """Those of a step that was made are the given ones, times the weight, and no longer than 1 in all."""
    length = weight * torch.stack([each.norm() for each in gradients.values()]).norm()
    for name, p in trainee.named_parameters():
        ours = torch.zeros_like(p) if p.grad is None else p.grad
        theirs = weight * gradients[name] / length.clamp_min(1)
        words = f"{name}: {{}}"
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-6, msg=words.format)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_reaches_every_dictionary(kind: str) -> None:
    """The KL and all its gradients are those of a replaced model written densely, and no weight goes without."""
    model, trainee = untrained(kind)
    record = one_step(model, trainee, kl_weight=1.0)
    kl, gradients = divergence(model, trainee)
    assert record.kl == record.loss == pytest.approx(kl, rel=1e-4)
    assert all(each.any() for each in gradients.values())
    assert_gradients(trainee, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_bridging_keeps_random_sites_of_the_model(kind: str, monkeypatch) -> None:
    """Its loss and gradients, but for the errors beside the original's activations, are those of a replaced model some
    of whose sites keep their own values; which ones is drawn, and all choices occur.
    """
    monkeypatch.setattr("replacement.training.end_to_end._BESIDE", 0.0)
    model, trainee = untrained(kind)
    choices = [names for n in range(len(trainee.written) + 1) for names in combinations(trainee.written, n)]
    expected, weight, drawn = {names: divergence(model, trainee, names) for names in choices}, 0.5, set()
    for seed in range(12):
        loss = one_step(model, trainee, bridging_weight=weight, seed=seed).loss
        kept = min(choices, key=lambda names: abs(weight * expected[names][0] - loss))
        kl, gradients = expected[kept]
        assert loss == pytest.approx(weight * kl, rel=1e-4, abs=1e-6)
        assert_gradients(trainee, gradients, weight=weight)
        drawn.add(kept)
    assert drawn == set(choices)
