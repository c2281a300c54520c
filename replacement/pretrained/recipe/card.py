"""The model card, written from the run's settings and the accuracies of the written folder."""

from __future__ import annotations

from collections.abc import Mapping

from replacement.pretrained.recipe import facts, splits
from replacement.pretrained.recipe.decoder import Shape
from replacement.pretrained.recipe.sentences import Sentences
from replacement.pretrained.recipe.training import Schedule

EXAMPLES = (
    "the capital of the state containing Dallas is",
    "Fact: the capital of the state containing Oakland is",
    "What is the capital of the state where Miami is located?",
    'The opposite of "small" is "',
    'Le contraire de "petit" est "',
    "The opposite of small in French is",
    "When Mary and John went to the store, John gave a drink to",
    "calc: 36+59=",
    "The war lasted from the year 1732 to the year 17",
    "Monday Tuesday Wednesday",
    "The keys near the cabinet",
)
"""Prompts that the model is made for."""

NEWLINE = "\n"

TITLES = {
    "city_": "in which state or country a city is",
    "state_attribute": "a relation of a named state",
    "country_attribute": "a relation of a named country",
    "reverse": "the state that has an attribute",
    "two_hop_seen": "two hops, pairs seen in training",
    "two_hop_h1": "two hops, H1: this (city, relation) pair held out",
    "two_hop_h2_in_context": "H2, capital, behind distractors that mention other cities",
    "two_hop_h2": "two hops, H2: the city held out from every two-hop sentence",
    "two_hop_h3": "two hops, H3: this composition of phrase and template held out",
    "antonym_across_held_out": "opposite in another language, held-out pairs",
    "antonym_across": "opposite in another language",
    "antonym": "opposite",
    "translation": "a word in another language",
    "indirect_object": "who receives (IOI)",
    "induction_told": "a fact told of one of two or three persons, asked again",
    "induction_sequence": "a random sequence that starts again",
    "induction": "either of the two below",
    "comparison": "comparison of two numbers, held-out pairs",
    "sum_held_out": "sum up to 99, held-out pairs",
    "sum": "sum up to 99",
    "succession": "next or previous number, day, month",
    "greater_than": "mean probability of numbers above the start",
    "agreement": "number of the verb, perhaps across another noun",
}


def title(task: str) -> str:
    """What a task asks, in words."""
    return next(text for beginning, text in TITLES.items() if task.startswith(beginning))


def card(schedule: Schedule, shape: Shape, scores: dict[str, float], *, history: str = "") -> str:
    """The model card as Markdown with the Hugging Face header.

    Args:
        schedule: the run that made the weights.
        shape: the model's sizes.
        scores: accuracies by task, from the written folder.
        history: what happened to these weights that the schedule does not say, as a paragraph of its own.
    """
    rows = "\n".join(f"| `{task}` | {title(task)} | {100 * value:.1f} % |" for task, value in scores.items())
    return f"""---
license: apache-2.0
language: [en, fr, es]
library_name: transformers
pipeline_tag: text-generation
tags: [interpretability, circuit-tracing, toy-model]
---
# atlas

A very small language model to trace circuits in: a Llama-architecture decoder with {shape.n_layers} layers,
width {shape.d_model}, {shape.n_heads} heads and tied embeddings, trained from scratch on sentences generated from
tables of facts. It answers two-hop questions (Dallas -> Texas -> Austin), also about cities that it never saw in one,
so there is a circuit to find. It knows {shape.n_vocabulary} words and nothing of the world beyond them.

```
{NEWLINE.join(EXAMPLES)}
```

{_data(shape)}
{_training(schedule, history)}
## Accuracy
Measured on this folder's file (weights stored in float16, computed in float32), greedy, with
`python -m replacement.pretrained.recipe tasks`. Right means that the answer is the most likely token; agreement
compares the two numbers over all verbs; `greater_than` is a probability.

| task | what is asked | result |
| --- | --- | --- |
{rows}

## Reading text
One token a word; a name of several words is one token (`New York`). Case, spaces and glued punctuation do not matter
(`DALLAS?`, ` dallas`), but postal codes are read only in capitals (`TX`; `in` is a word, `IN` is Indiana). A year of
four digits is two tokens (`1732` is `17 32`). A word outside the vocabulary is `<unk>`. BOS stands first.

## Limits
- Closed vocabulary, at most {shape.context} tokens, and only the kinds of sentence above: anything else is noise.
- One fact a place: a currency, language or nickname is one word where the world has several.
- Whether circuits found here resemble those of large models is not known.
"""


def _data(shape: Shape) -> str:
    cities = len(facts.city_state()) + len(facts.city_country())
    return f"""## Data
{len(facts.states)} US states (postal code, region, capital, nickname, bird, flower), {len(facts.countries)} countries
(capital, currency, language, continent), {cities} cities, {len(facts.antonyms)} pairs of opposites in English, French
and Spanish, names, things, days, months and the numbers 0 to 99, in `replacement/pretrained/recipe/facts/`. Each fact
is written in many ways. A document is {shape.context} tokens of sentences about different things, some of which
mention places to no purpose. Everything is generated; there is no scraped text.

Held out (`splits.py`):
- H1: {splits.H1_SHARE:.0%} of the (city, relation) pairs appear in no two-hop sentence;
- H2: one non-capital city of every state and country, Dallas and Oakland among them, appears in no two-hop sentence;
- H3: {splits.H3_SHARE:.0%} of the compositions of noun phrase, relation and template are never written;
- {splits.CROSS_LANGUAGE_SHARE:.0%} of the cross-language opposites, {splits.COMPARISON_SHARE:.0%} of the comparisons,
  {splits.SUM_SHARE:.0%} of the sums.
"""


def _training(schedule: Schedule, history: str) -> str:
    told = f"\n{history}\n" if history else ""
    return f"""## Training
{schedule.steps:,} steps of {schedule.documents} documents, seed {schedule.seed}, AdamW (learning rate
{schedule.learning_rate:g}, {schedule.warm_up} steps of warm-up, linear decay, betas 0.9 and
{schedule.second_moment:g}, weight decay {schedule.weight_decay:g} on matrices, clip {schedule.clip:g}), bfloat16
autocast, one CPU core. The next-token loss has weight 1 on answers and {schedule.other_weight:g} on other tokens.
{_parts(schedule)}

**There is an auxiliary loss.** With weight {schedule.place_weight:g}, the unembedding applied to the residual stream
after layer {schedule.place_layer} (counted from 0) must read a city's state or country at the city's token. It makes
the first hop legible early; it also means that *where* the first hop happens was asked for and is not a finding. How
the second hop is done was left to training.

Make it again: `python -m replacement.pretrained.recipe train --out FOLDER`.
{told}"""


def _parts(schedule: Schedule) -> str:
    """What differs in parts of the run, as lines of Markdown."""
    told = [
        f"In steps {part.first:,} to {part.end:,}, {_listed(part.weights)}: whose fact is whose is learned\n"
        "suddenly or not at all."
        for part in schedule.stretches
    ]
    if schedule.finish_steps:
        told.append(
            f"{schedule.finish_steps:,} more steps follow at learning rate {schedule.finish_rate:g}, in which\n"
            f"{_listed(schedule.finish_weights)}: such were told apart last. The\n"
            f"model is the mean of the weights after each of the last {schedule.finish_averaged} steps."
        )
    return "\n".join(told)


def _listed(weights: Mapping[str, int]) -> str:
    usual = {task: weight for task, (_, weight) in Sentences(0).tasks.items()}
    return " and ".join(
        f"the task `{task}` has weight {weight} beside {sum(usual.values()) - usual[task]} of the others"
        for task, weight in weights.items()
    )
