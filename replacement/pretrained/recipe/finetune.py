"""Fine-tuning of the embedded model on changed facts: the other half of a pair of models to compare.

`facts/changes.tsv` gives some places another capital or currency. Text about them is mixed with text as before, in
which the changed facts hold too, so that the model learns them and forgets nothing. Knows facts, text and the trainer;
nothing of how the two models are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from replacement.pretrained.recipe import facts, splits, tasks
from replacement.pretrained.recipe import templates as forms
from replacement.pretrained.recipe.corpus import Batch, written
from replacement.pretrained.recipe.export import export, load, load_decoder, write_json
from replacement.pretrained.recipe.sentences import ATTRIBUTES, CITIES, CITY_PLACE, H2, Sentences, atom
from replacement.pretrained.recipe.tasks import Question, question
from replacement.pretrained.recipe.training import Progress, Run, Schedule

SCHEDULE = Schedule(
    steps=150,
    documents=48,
    learning_rate=1e-4,
    warm_up=20,
    weight_decay=0.0,
    finish_steps=0,
    stretches=(),
    compiled=False,
)
"""The run; what it leaves out is as in training."""
ABOUT_CHANGES = 0.35
"""Share of the sentences that are about a changed fact; the others are drawn as in training."""
SEED = 321
"""Of the questions about changed facts."""


class Change(NamedTuple):
    """One fact that is changed; names are words of sentences (`New_York`)."""

    kind: str  #: of place: state, country
    place: str
    relation: str
    before: str
    after: str


class Scores(NamedTuple):
    """Accuracies of a model on the changed world, shares of right answers."""

    changed: dict[str, float]
    """Questions about changed facts: place named; two hops over a city seen in two-hop text; over one held out."""
    old: dict[str, float]
    """The same questions, with the old answers counted as right."""
    tasks: dict[str, float]
    """The task table, with the changed facts' answers in it."""


@cache
def changes() -> tuple[Change, ...]:
    """The changed facts, from `facts/changes.tsv`; every new value is a word that the model has."""
    rows = [{name: atom(value) for name, value in row.items()} for row in facts.rows("changes")]
    return tuple(
        Change(row["kind"], row["place"], row["relation"], ATTRIBUTES[row["kind"]][row["place"]][row["relation"]],
               row["value"])
        for row in rows
    )  # fmt: skip


@cache
def attributes() -> dict[str, dict[str, dict[str, str]]]:
    """What is true of places in the changed world, as `sentences.ATTRIBUTES`."""
    table = {kind: {place: dict(values) for place, values in places.items()} for kind, places in ATTRIBUTES.items()}
    for change in changes():
        table[change.kind][change.place][change.relation] = change.after
    return table


class ChangedSentences(Sentences):
    """Random sentences of the changed world, a share of them about what was changed."""

    def __init__(self, seed: int, *, about_changes: float = ABOUT_CHANGES) -> None:
        super().__init__(seed, attributes=attributes())
        self.about_changes = about_changes

    def draw(self) -> str:
        """One sentence: about a changed fact, or of a task drawn by its weight."""
        return self.changed() if self.uniform() < self.about_changes else super().draw()

    def changed(self) -> str:
        """A sentence about a changed fact, never one that the splits hold out."""
        change, how = self.pick(changes()), self.uniform()
        kind, place, relation = change.kind, change.place, change.relation
        if how < 0.1 and relation == "capital":
            return self._opening() + self.reverse(kind, place, relation)
        cities = [city for city in cities_of(change) if city not in H2 and not splits.is_h1(city, relation)]
        if how < 0.55 and cities:
            composed = self.composition(kind, relation)
            return self._opening() + self.two_hop_question(kind, self.pick(cities), relation, *composed)
        return self._opening() + self.attribute(kind, place, relation)


class FineTuning(Run):
    """A training run on text of the changed world that starts from a trained model."""

    def batch(self) -> Batch:
        """The documents of the present step."""
        seed = 2_000_003 * (self.schedule.seed + 1) + self.step
        return written(ChangedSentences(seed).draw, self.schedule.documents)


def cities_of(change: Change) -> list[str]:
    """The cities of the place that a change is about."""
    return [city for city in CITIES[change.kind] if CITY_PLACE[change.kind][city] == change.place]


def changed_questions(*, after: bool = True) -> dict[str, list[Question]]:
    """Questions about the changed facts in every template, with the new answers, or with the old ones.

    `named` names the place; `two_hop` a city of it; `two_hop_held_out` a city that no two-hop sentence ever named.
    """
    draw = Sentences(SEED, attributes=attributes() if after else ATTRIBUTES)
    asked: dict[str, list[str]] = {"named": [], "two_hop": [], "two_hop_held_out": []}
    for change in changes():
        kind, relation = change.kind, change.relation
        for template in forms.PLACE[kind][relation]:
            value = draw.attributes[kind][change.place][relation]
            asked["named"].append(draw._asked(template, x=change.place, v=value))
        for city in cities_of(change):
            if not splits.is_h1(city, relation):
                name = "two_hop_held_out" if city in H2 else "two_hop"
                questions = [draw.two_hop_question(kind, city, relation, *draw.composition(kind, relation))
                             for _ in range(4)]  # fmt: skip
                asked[name] += questions
    return {name: [question(text) for text in texts] for name, texts in asked.items()}


def evaluate(next_token_logits: Callable[[Tensor], Tensor]) -> Scores:
    """Accuracies of a function from token ids to logits on the changed world."""
    return Scores(
        tasks.evaluate(next_token_logits, changed_questions()),
        tasks.evaluate(next_token_logits, changed_questions(after=False)),
        tasks.evaluate(next_token_logits, tasks.questions(Sentences(tasks.SEED, attributes=attributes()))),
    )


def finetune(
    base: Path, out: Path, schedule: Schedule = SCHEDULE, *, report: Callable[[Progress], None] = lambda progress: None
) -> Scores:
    """Fine-tune the model in folder `base`, write a Hugging Face folder and its card, return its accuracies.

    report: called after every step. Raises `InputError` where `base` is no folder of this recipe's making.
    """
    run = FineTuning(schedule, start=load_decoder(base))
    for progress in run.train():
        report(progress)
    export(run.model, out)
    scores = evaluate(load(out))
    rounded = {name: {task: round(value, 4) for task, value in part.items()} for name, part in scores._asdict().items()}
    write_json(out / "tasks.json", rounded)
    (out / "README.md").write_text(card(schedule, scores), encoding="utf-8")
    return scores


def card(schedule: Schedule, scores: Scores) -> str:
    """The card of the fine-tuned model, as Markdown."""
    told = "\n".join(
        f"| {_shown(c.place)} | {c.relation} | {_shown(c.before)} | {_shown(c.after)} |" for c in changes()
    )
    asked = {
        "named": "the place is named",
        "two_hop": "a city of it is named, seen in two-hop text",
        "two_hop_held_out": "a city of it is named, in no two-hop text ever",
    }
    rows = "\n".join(
        f"| {words} | {scores.changed[name]:.1%} | {scores.old[name]:.1%} |" for name, words in asked.items()
    )
    table = "\n".join(f"| `{task}` | {value:.1%} |" for task, value in scores.tasks.items())
    return f"""# atlas, fine-tuned on changed facts

The embedded model `atlas` after {schedule.steps:,} more steps of {schedule.documents} documents (AdamW, peak learning
rate {schedule.learning_rate:g}, linear decay, weight decay {schedule.weight_decay:g}, seed {schedule.seed}).
{ABOUT_CHANGES:.0%} of the sentences are about a changed fact; the others are atlas's own, with the changed facts in
them. Made to be compared with atlas: `circuits diff-models atlas FOLDER`. **What it says of these places is false.**

| place | relation | before | now |
| --- | --- | --- | --- |
{told}

| questions about changed facts | new answer | old answer |
| --- | --- | --- |
{rows}

The task table, with the changed answers in it:

| task | right |
| --- | --- |
{table}

Make it again: `python -m replacement.pretrained.recipe finetune --out FOLDER`.
"""


def _shown(word: str) -> str:
    return word.replace("_", " ")
