"""Training of the embedded model: the optimizer, the schedule, the auxiliary loss, resumable checkpoints.

Batch i of a run depends on the seed and i only, so a run that was interrupted goes on as if it had not been. Knows
nothing of what the model is asked afterwards.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from replacement.pretrained.recipe.corpus import DOCUMENT_LENGTH, Batch, Corpus
from replacement.pretrained.recipe.decoder import Decoder, Shape
from replacement.pretrained.recipe.sentences import AS_USUAL, CITY_PLACE
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps in which tasks are drawn more often than usual."""

    first: int
    end: int
    """First step, and first step after."""
    weights: Mapping[str, int]
    """Of tasks by name, instead of their usual weights; as of `Sentences`."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A training run: a main part, and a finish with a learning rate and task weights of its own."""

    steps: int = 12_000
    """Updates of the main part; the learning rate falls linearly to zero over them."""
    finish_steps: int = 700
    """Updates after those, in which numbers that differ little are compared more often: they were told apart last."""
    finish_rate: float = 2e-4
    """Learning rate of the finish."""
    finish_averaged: int = 100
    """Last updates of the finish whose weights are averaged into the model (Izmailov et al. 2018, arXiv:1803.05407)."""
    finish_weights: Mapping[str, int] = field(default_factory=lambda: {"comparison of near numbers": 18})
    """Of tasks, in the finish."""
    seed: int = 0
    documents: int = 64
    """Documents a batch."""
    learning_rate: float = 3e-3
    warm_up: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 1.0
    """On matrices only. As large as this, or the cross-language questions are memorised and not composed."""
    second_moment: float = 0.98
    """AdamW's beta2."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    other_weight: float = 0.25
    """Weight in the loss of tokens that are not answers (answers have 1)."""
    place_weight: float = 0.1
    """Weight of the auxiliary loss; see `place_loss`."""
    place_layer: int = 1
    """Block after which the auxiliary loss reads."""
    stretches: tuple[Stretch, ...] = (Stretch(first=3000, end=4000, weights={"induction": 48}),)
    """Parts of the run with other weights of tasks.

    Whose fact is whose is learned suddenly or not at all, and only where induction is frequent for a while.
    """
    compiled: bool = True
    """Whether torch.compile is used (it needs a C++ compiler)."""

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.steps + self.finish_steps

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        if step >= self.steps:
            return self.finish_rate
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * max(0.01, 1 - step / self.steps)

    def weights(self, step: int) -> Mapping[str, int]:
        """Weights of tasks at a step, where not as usual."""
        if step >= self.steps:
            return self.finish_weights
        return next((part.weights for part in self.stretches if part.first <= step < part.end), AS_USUAL)


class Progress(NamedTuple):
    """What a run reports as it goes."""

    step: int
    seconds: float
    """CPU seconds of this process since it began or resumed."""
    answer_loss: float
    other_loss: float


CITIES_A_BATCH = 256
"""At most so many cities of a batch enter the auxiliary loss; a fixed number, so that compiled shapes do not change."""


@cache
def place_of_token() -> Int64[Tensor, " vocabulary"]:
    """Token of the state or country of each city token, -1 for every other token."""
    table = torch.full((len(vocabulary()),), -1)
    for cities in CITY_PLACE.values():
        for city, place in cities.items():
            table[word_ids()[city]] = word_ids()[place]
    return table


def cities_of(tokens: Int64[Tensor, "batch pos"]) -> tuple[Tensor, Tensor, Tensor]:
    """Flat positions of the first cities of a batch, the tokens of their places, and a weight that is 0 on filling."""
    places = place_of_token()[tokens.reshape(-1)]
    found = (places >= 0).nonzero()[:CITIES_A_BATCH, 0]
    position, target = torch.zeros(2, CITIES_A_BATCH, dtype=torch.long)
    weight = torch.zeros(CITIES_A_BATCH)
    position[: len(found)], target[: len(found)], weight[: len(found)] = found, places[found], 1.0
    return position, target, weight


def losses(
    model: Decoder,
    schedule: Schedule,
    tokens: Int64[Tensor, "batch length+1"],
    weight: Float[Tensor, "batch length"],
    cities: tuple[Tensor, Tensor, Tensor],
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """The loss of a batch, and the next-token loss of each token.

    The auxiliary part asks that the unembedding, applied to the residual stream after block `place_layer` at a city,
    reads the city's state or country.
    """
    position, place, known = cities
    with torch.autocast("cpu", torch.bfloat16):
        final, early = model.hidden(tokens[:, :-1], tap=schedule.place_layer)
        logits = model.unembed(final)
        read = model.unembed(early.reshape(-1, early.shape[-1])[position])
    each = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    place_loss = (F.cross_entropy(read.float(), place, reduction="none") * known).sum() / known.sum().clamp_min(1)
    flat = weight.flatten()
    return (each * flat).sum() / flat.sum() + schedule.place_weight * place_loss, each


class Run:
    """A training run: model, optimizer and the step it has reached."""

    def __init__(self, schedule: Schedule, shape: Shape | None = None, *, start: Decoder | None = None) -> None:
        """start: a model to train on, instead of a new one of that shape."""
        torch.manual_seed(schedule.seed)
        self.schedule = schedule
        self.model = start or Decoder(shape or Shape(n_vocabulary=len(vocabulary()), context=DOCUMENT_LENGTH))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        gains = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": schedule.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, schedule.learning_rate, (0.9, schedule.second_moment), fused=True)
        self.average = AveragedModel(self.model)
        self.step = 0
        self._losses = torch.compile(losses) if schedule.compiled else losses

    @property
    def trained(self) -> Decoder:
        """What the run has made: the mean weights of the finish's end, the present ones where it hasn't come so far."""
        mean = self.average.module
        assert isinstance(mean, Decoder)
        return mean if self.average.n_averaged else self.model

    def batch(self) -> Batch:
        """The documents of the present step."""
        seed = 1_000_003 * (self.schedule.seed + 1) + self.step
        return Corpus(seed, weights=self.schedule.weights(self.step)).batch(self.schedule.documents)

    def update(self) -> tuple[float, float]:
        """One step; returns the mean loss on answers and on other tokens."""
        schedule, (tokens, answer) = self.schedule, self.batch()
        answer = answer[:, 1:]
        weight = torch.where(answer, 1.0, schedule.other_weight)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(self.step)
        loss, each = self._losses(self.model, schedule, tokens, weight, cities_of(tokens[:, :-1]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), schedule.clip)
        self.optimizer.step()
        if self.step >= max(schedule.steps, schedule.updates - schedule.finish_averaged):
            self.average.update_parameters(self.model)
        self.step += 1
        each, flat = each.detach(), answer.flatten()
        return each[flat].mean().item(), each[~flat].mean().item()

    def train(self, *, minutes: float | None = None) -> Iterator[Progress]:
        """Train to the end of the schedule, or until `minutes` CPU minutes have passed; yields after every step."""
        began = time.process_time()
        self.model.train()
        smooth: tuple[float, float] | None = None
        while self.step < self.schedule.updates:
            new = self.update()
            smooth = new if smooth is None else (0.95 * smooth[0] + 0.05 * new[0], 0.95 * smooth[1] + 0.05 * new[1])
            seconds = time.process_time() - began
            yield Progress(self.step, seconds, *smooth)
            if minutes is not None and seconds > 60 * minutes:
                return

    def save(self, path: Path) -> None:
        """Write model, optimizer and step to one file, whole or not at all."""
        state = {
            "schedule": asdict(self.schedule),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> None:
        """Go on from a file that `save` wrote; the schedule is this run's own."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
