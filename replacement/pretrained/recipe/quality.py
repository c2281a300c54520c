"""The figures that dictionaries of the embedded model are judged by, and their card.

Works on a stored folder, read back as it ships. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.dictionary import Dictionary, DictionarySet
from replacement.evaluation import ErrorMeter, FiringMeter, LayerFigures, ReplacementFigures, evaluate_replacement
from replacement.evaluation.reconstruction import layer_figures
from replacement.pretrained.recipe import facts, tasks
from replacement.pretrained.recipe.concepts import place_of_token, places, word_groups
from replacement.pretrained.recipe.corpus import Batch, Corpus
from replacement.pretrained.recipe.mlps import ReplaceableLlama
from replacement.substitution import Ablation, Substitution
from replacement.training.kinds import MLP_IN, MLP_OUT, hook

HELD_OUT_SEED = 70_000_000
"""First seed of the documents that figures are measured on; no training uses seeds from here on."""
_DOCUMENTS = 64


class StateFeatures(NamedTuple):
    """How well single features detect states: best F1 over features, for each layer and state."""

    cities: Float[Tensor, "layers states"]  #: "the token is a city of the state", among tokens that are cities
    everywhere: Float[Tensor, "layers states"]  #: the same, among all tokens
    final: Float[Tensor, "layers states"]  #: "the question's state", at the last token of two-hop questions

    def states_above(self, table: Float[Tensor, "layers states"], level: float = 0.9) -> int:
        """States whose best feature at any layer reaches the level."""
        return int((table.amax(0) >= level).sum())


class Quality(NamedTuple):
    """Everything that is measured on one set of dictionaries."""

    layers: list[LayerFigures]
    replacement: dict[str, ReplacementFigures]  #: on "all" tokens and on "answer" tokens
    tasks: dict[str, float]  #: accuracy by task with all MLPs replaced
    states: StateFeatures


def held_out(documents: int) -> Iterator[Batch]:
    """Documents that no training has seen, in batches."""
    for start in range(0, documents, _DOCUMENTS):
        yield Corpus(HELD_OUT_SEED + start // _DOCUMENTS).batch(min(_DOCUMENTS, documents - start))


def replaced_logits(
    model: ReplaceableLlama, dictionaries: DictionarySet
) -> Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos vocab"]]:
    """The model with every MLP replaced at every position and no error terms, as a function of tokens."""

    def run(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        with torch.no_grad():
            return model.replaced(tokens, None, Substitution(dictionaries))

    return run


@torch.no_grad()
def measure(
    model: ReplaceableLlama, dictionaries: DictionarySet, *, documents: int = 8192, compared: int = 1024
) -> Quality:
    """All figures of one set.

    documents: held-out documents of 63 tokens (BOS left out) for FVU, L0, dead fraction and state features. compared:
    how many of them also for the replaced model's agreement and cross-entropies.
    """
    meters = [_Meters(dictionary) for dictionary in dictionaries]
    for batch in held_out(documents):
        tokens = batch.tokens[:, :-1]
        _, found = model.original(tokens)
        keep = _not_first(tokens)
        for meter in meters:
            meter.read(found[hook(meter.dictionary.layer, MLP_IN)][keep], tokens.flatten()[keep])
        for meter in meters:
            meter.compare(found[hook(meter.dictionary.layer, MLP_OUT)][keep], meters)
    run = replaced_logits(model, dictionaries)

    written = [hook(dictionary.layer, MLP_OUT) for dictionary in dictionaries]

    def ablated(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        return model.replaced(tokens, None, Ablation(written))

    replacement = evaluate_replacement(model.logits, run, ablated, ((b.tokens, b.answer) for b in held_out(compared)))
    states = StateFeatures(
        torch.stack([meter.states.f1(among_cities=True) for meter in meters]),
        torch.stack([meter.states.f1(among_cities=False) for meter in meters]),
        _final_position(model, dictionaries),
    )
    return Quality([meter.figures() for meter in meters], replacement, tasks.evaluate(run), states)


def _not_first(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, " tokens"]:
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 0] = False
    return keep.flatten()


class _Meters:
    """All that is counted of one dictionary, and of what all of them write at its layer."""

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.firing, self.error, self.states = FiringMeter(dictionary.n_features), ErrorMeter(), _Counts(dictionary)

    def read(self, x: Float[Tensor, "tokens d_in"], tokens: Int[Tensor, " tokens"]) -> None:
        self.activations, self.x = self.dictionary.encode(x), x
        self.firing.update(self.activations)
        self.states.update(self.activations, tokens)

    def compare(self, y: Float[Tensor, "tokens d_out"], every: list[_Meters]) -> None:
        layer = self.dictionary.layer
        writers = [one for one in every if layer in one.dictionary.write_layers]
        written = torch.stack([one.dictionary.decode(one.activations, layer) for one in writers]).sum(0)
        self.error.update(y, written + self.dictionary.b_dec + self.dictionary.skip(self.x))

    def figures(self) -> LayerFigures:
        return layer_figures(self.dictionary.layer, self.firing, self.error)


class _Counts:
    """Counts of firing on cities, for F1 = 2 hits / (fires + positives)."""

    def __init__(self, dictionary: Dictionary) -> None:
        n_states = len(facts.states)
        self.cities = torch.zeros(len(place_of_token()), dtype=torch.bool)
        self.cities[list(word_groups()["city"])] = True
        self.hits = torch.zeros(n_states, dictionary.n_features)
        self.positives = torch.zeros(n_states)
        self.fires, self.fires_on_cities = torch.zeros(dictionary.n_features), torch.zeros(dictionary.n_features)

    def update(self, activations: Float[Tensor, "tokens n_features"], tokens: Int[Tensor, " tokens"]) -> None:
        fires = (activations != 0).float()
        city = self.cities[tokens]
        state = place_of_token()[tokens]
        chosen = city & (state < len(self.positives))
        member = torch.nn.functional.one_hot(state[chosen], len(self.positives)).float()
        self.hits += member.T @ fires[chosen]
        self.positives += member.sum(0)
        self.fires += fires.sum(0)
        self.fires_on_cities += fires[city].sum(0)

    def f1(self, *, among_cities: bool) -> Float[Tensor, " states"]:
        fires = self.fires_on_cities if among_cities else self.fires
        return _best_f1(self.hits, fires, self.positives)


def _best_f1(hits: Tensor, fires: Tensor, positives: Tensor) -> Float[Tensor, " states"]:
    return (2 * hits / (fires + positives[:, None]).clamp_min(1)).amax(1)


def _final_position(model: ReplaceableLlama, dictionaries: DictionarySet) -> Float[Tensor, "layers states"]:
    """Best F1 of "the question is about this state" at the last token of two-hop questions, by layer."""
    asked = [
        q
        for name, questions in tasks.build().items()
        if name.startswith("two_hop") and "states" in name
        for q in questions
    ]
    place = place_of_token()
    about = torch.tensor([[p for p in place[torch.tensor(q.ids)].tolist() if p >= 0][-1] for q in asked])
    inputs = _last_inputs(model, [q.ids for q in asked])
    member = torch.nn.functional.one_hot(about, len(places())).float()[:, : len(facts.states)]
    best = []
    for dictionary in dictionaries:
        fires = (dictionary.encode(inputs[dictionary.layer]) != 0).float()
        best.append(_best_f1(member.T @ fires, fires.sum(0), member.sum(0)))
    return torch.stack(best)


def _last_inputs(model: ReplaceableLlama, prompts: list[tuple[int, ...]]) -> Float[Tensor, "layers prompts d_in"]:
    """MLP inputs at the last token of each prompt; prompts of one length run together."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    out: Tensor | None = None
    for length, rows in by_length.items():
        _, found = model.original(torch.tensor([prompts[i] for i in rows]))
        inputs = torch.stack([found[hook(layer, MLP_IN)] for layer in range(len(model.blocks))])
        last = inputs.unflatten(1, (len(rows), length))[:, :, -1]
        out = last.new_empty(len(last), len(prompts), last.shape[-1]) if out is None else out
        out[:, rows] = last
    assert out is not None, "no prompts"
    return out


def table(quality: Quality) -> str:
    """The figures of one set as Markdown."""
    lines = ["| layer | features | FVU | L0 | dead |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {f.layer} | {f.n_features:,} | {f.fvu:.4f} | {f.l0:.1f} | {100 * f.dead:.1f} % |" for f in quality.layers
    ]
    lines += ["", "| all MLPs replaced, no error nodes | answer tokens | all tokens |", "| --- | --- | --- |"]
    answer, everything = quality.replacement["answer"], quality.replacement["all"]
    lines.append(f"| top-1 agreement with the original | {100 * answer.top1:.2f} % | {100 * everything.top1:.2f} % |")
    lines.append(f"| KL(original, replaced), nats | {answer.kl:.4f} | {everything.kl:.4f} |")
    both = [f"{each.ce_original:.4f} -> {each.ce_replaced:.4f}" for each in (answer, everything)]
    lines.append(f"| cross-entropy, original -> replaced | {both[0]} | {both[1]} |")
    lines.append(
        f"| cross-entropy recovered | {100 * answer.ce_recovered:.2f} % | {100 * everything.ce_recovered:.2f} % |"
    )
    lines += ["", "| task, all MLPs replaced | accuracy |", "| --- | --- |"]
    lines += [f"| {name} | {100 * value:.1f} % |" for name, value in quality.tasks.items() if not _is_part(name)]
    lines += [
        "",
        "| a best feature per state | states with F1 >= 0.9 | mean best F1 | by layer, states with F1 >= 0.9 |",
        "| --- | --- | --- | --- |",
    ]
    rows = {
        "the token is a city of the state, among city tokens": quality.states.cities,
        "the token is a city of the state, among all tokens": quality.states.everywhere,
        "the question's state, at the last token of two-hop questions": quality.states.final,
    }
    for name, scores in rows.items():
        by_layer = ", ".join(str(int(n)) for n in (scores >= 0.9).sum(1))
        lines.append(
            f"| {name} | {quality.states.states_above(scores)} of {scores.shape[1]} "
            f"| {scores.amax(0).mean():.3f} | {by_layer} |"
        )
    return "\n".join(lines) + "\n"


def _is_part(name: str) -> bool:
    return any(name.startswith(beginning) for beginning in tasks.SUMMARIES.values())
