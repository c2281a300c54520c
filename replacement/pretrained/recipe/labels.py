"""Words for every feature, made from data: the concept it fires on best, or the answer it announces.

Over documents of the corpus each feature's strong activations (above half of its highest) are summed by token, by place
spoken of, by relation asked for and by answer that comes next. A concept's *precision* is the share of that sum that
falls on it, its *recall* the share of the concept's positions where the feature fires strongly; the label is the
concept with the largest `precision * recall^(1/4)`. Where none fits, the label lists the tokens the feature fires on.
Labels are descriptions of correlations, not proofs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.dictionary import Dictionary
from replacement.pretrained.recipe.concepts import ANSWER, ASKED, PLACE, TOKEN, Annotations, Concept, concepts, places
from replacement.pretrained.recipe.vocabulary import vocabulary

LONGEST = 40
"""Characters of a label."""
_STRONG = 0.5  # share of a feature's highest activation from which it counts
_RECALL_POWER = 0.25
_GOOD = 0.55  # score that a concept needs to become the label
_SURE = 0.8  # precision that is enough at any recall
_CONTEXT = 0.75  # precision that a second concept needs to be added
_STANDS_OUT = 5.0  # standard deviations above the mean over the vocabulary
_VARIABLES = (TOKEN, PLACE, ASKED, ANSWER)


class Profile(NamedTuple):
    """What one layer's features fire on, by value of each variable; the last column of each table is "none"."""

    mass: list[Float[Tensor, "n_features values+1"]]  #: summed strong activation
    fires: list[Float[Tensor, "n_features values+1"]]  #: number of positions with strong activation
    seen: list[Float[Tensor, " values+1"]]  #: positions with this value, firing or not
    peak: Float[Tensor, " n_features"]  #: highest activation so far, 0 for a feature that never fired

    @torch.no_grad()
    def add(
        self, dictionary: Dictionary, x: Float[Tensor, "tokens d_in"], annotations: Annotations, *, count: bool
    ) -> None:
        """Take in a batch of inputs, in the order of the flattened annotations; `count=False` takes only peaks."""
        activations = dictionary.encode(x)
        torch.maximum(self.peak, activations.amax(0), out=self.peak)
        if not count:
            return
        token, feature = (activations > _STRONG * self.peak.clamp_min(1e-9)).nonzero().T
        values = activations[token, feature].float()
        for variable in _VARIABLES:
            width = len(self.seen[variable])
            value = annotations[variable].flatten() % width  # -1 becomes the last column
            flat = feature * width + value[token]
            self.mass[variable].view(-1).index_add_(0, flat, values)
            self.fires[variable].view(-1).index_add_(0, flat, torch.ones_like(values))
            self.seen[variable] += torch.bincount(value, minlength=width)

    def rows(self, features: Int[Tensor, " n"]) -> Profile:
        """The profile of some of the features."""
        mass, fires = ([table[features] for table in side] for side in (self.mass, self.fires))
        return Profile(mass, fires, self.seen, self.peak[features])


class Fit(NamedTuple):
    """How well each concept of one variable describes each feature."""

    concepts: list[Concept]
    precision: Float[Tensor, "n_features concepts"]
    recall: Float[Tensor, "n_features concepts"]

    @property
    def score(self) -> Float[Tensor, "n_features concepts"]:
        return self.precision * self.recall**_RECALL_POWER


def _sizes() -> dict[int, int]:
    n_asked = sum(concept.variable == ASKED for concept in concepts())
    return {TOKEN: len(vocabulary()), PLACE: len(places()), ASKED: n_asked, ANSWER: len(vocabulary())}


def profile(dictionary: Dictionary) -> Profile:
    """An empty profile of a dictionary's features."""
    sizes = _sizes()
    mass = [torch.zeros(dictionary.n_features, sizes[v] + 1) for v in _VARIABLES]
    fires, seen = [torch.zeros_like(each) for each in mass], [torch.zeros(sizes[v] + 1) for v in _VARIABLES]
    return Profile(mass, fires, seen, torch.zeros(dictionary.n_features))


def fit(found: Profile, variable: int) -> Fit:
    """Precision and recall of every concept of one variable, for every feature."""
    members = [concept for concept in concepts() if concept.variable == variable]
    table = torch.zeros(found.seen[variable].shape[0], len(members))
    for column, concept in enumerate(members):
        table[list(concept.values), column] = 1
    total = found.mass[variable].sum(1, keepdim=True).clamp_min(1e-9)
    precision = found.mass[variable] @ table / total
    recall = found.fires[variable] @ table / (found.seen[variable] @ table).clamp_min(1)
    return Fit(members, precision, recall)


def label_features(dictionary: Dictionary, found: Profile, output: Float[Tensor, "d_out vocab"]) -> dict[int, str]:
    """A label for every feature of one layer.

    found: the layer's profile. output: final norm's weight times unembedding, what a unit of each residual direction
    adds to the logits.
    """
    fits = [fit(found, v) for v in _VARIABLES]
    precision = torch.cat([each.precision for each in fits], 1)
    scores = torch.cat([each.score for each in fits], 1)
    scores = torch.where((scores >= _GOOD) | (precision >= _SURE), scores, 0.0)
    best = scores.max(1)
    members = [concept for each in fits for concept in each.concepts]
    promoted = promoted_tokens(dictionary, output)
    labels: dict[int, str] = {}
    for feature in range(dictionary.n_features):
        if found.mass[TOKEN][feature].sum() == 0:
            labels[feature] = f"rare, promotes {promoted[feature]}" if promoted[feature] else "rare"
        elif best.values[feature] > 0:
            labels[feature] = _with_context(members[int(best.indices[feature])], fits, feature)
        else:
            labels[feature] = _mixture(found, feature)
    return _distinguish(labels, promoted)


@torch.no_grad()
def promoted_tokens(dictionary: Dictionary, output: Float[Tensor, "d_out vocab"]) -> list[str]:
    """The token that each feature raises most by its direct path to the logits, "" where none stands out."""
    every = torch.arange(dictionary.n_features)
    written = torch.stack([dictionary.write_rows(every, layer) for layer in dictionary.write_layers]).sum(0)
    effect = written @ output
    highest = ((effect - effect.mean(1, keepdim=True)) / effect.std(1, keepdim=True).clamp_min(1e-9)).max(1)
    shown = vocabulary()
    return [
        shown[index] if value >= _STANDS_OUT else ""
        for value, index in zip(highest.values.tolist(), highest.indices.tolist(), strict=True)
    ]


def _with_context(concept: Concept, fits: list[Fit], feature: int) -> str:
    """The concept, and where it covers few of its positions a second condition that holds nearly always."""
    mine = fits[concept.variable]
    column = mine.concepts.index(concept)
    if mine.recall[feature, column] > 0.5:
        return concept.name
    for other in (ANSWER, PLACE, ASKED) if concept.variable == TOKEN else (TOKEN,):
        there = fits[other]
        column = int(there.score[feature].argmax())
        if there.precision[feature, column] >= _CONTEXT:
            second = there.concepts[column].name
            joined = f"{concept.name}, at {second!r}" if other == TOKEN else f"{concept.name} ({second})"
            if len(joined) <= LONGEST:
                return joined
    return concept.name


def _mixture(found: Profile, feature: int) -> str:
    """The tokens or answers that hold most of the activation, strongest first."""
    shown = vocabulary()
    answers, tokens = found.mass[ANSWER][feature, :-1], found.mass[TOKEN][feature, :-1]
    announces = answers.sum() > 0.8 * tokens.sum() and answers.max() > tokens.max()
    table, prefix = (answers, "say ") if announces else (tokens, "")
    label = ""
    for index in table.argsort(descending=True)[:6].tolist():
        longer = f"{label}, {shown[index]}" if label else prefix + shown[index]
        if label and table[index] <= 0.02 * table.sum():
            return label
        if len(longer) > LONGEST - 3:
            break
        label = longer
    return label + ", …"


def _distinguish(labels: dict[int, str], promoted: list[str]) -> dict[int, str]:
    """Where several features of a layer have one label, add what each promotes."""
    count: dict[str, int] = {}
    for label in labels.values():
        count[label] = count.get(label, 0) + 1
    out = {}
    for feature, label in labels.items():
        token, longer = promoted[feature], f"{label} → {promoted[feature]}"
        fits = token and token not in label and len(longer) <= LONGEST
        out[feature] = longer if fits and count[label] > 1 else label
    return out
