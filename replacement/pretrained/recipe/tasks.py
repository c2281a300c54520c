"""The task table: questions by task, held-out splits apart, and the accuracy of any model function on them.

Knows prompts and answers, and of a model only that it maps token ids to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from replacement.pretrained.recipe import facts, splits
from replacement.pretrained.recipe import templates as forms
from replacement.pretrained.recipe.sentences import ANTONYMS, CITIES, H2, LARGEST, PLACES, VERBS, Sentences
from replacement.pretrained.recipe.vocabulary import BOS, PAD, vocabulary, word_ids

SEED = 123
"""Of the questions."""
QUESTIONS = 400
"""Random questions of a task whose questions are not a list."""
SUMMARIES = {"two_hop_h2_states": "two_hop_h2_states_", "two_hop_h2_countries": "two_hop_h2_countries_"}
"""Rows that are the mean of the rows that begin so."""


class Question(NamedTuple):
    """A prompt and the word that should follow."""

    prompt: str
    """Text, as the tokenizer shows it."""
    answer: str
    ids: tuple[int, ...]
    """Token ids of the prompt, BOS first."""
    answer_id: int


def question(sentence: str) -> Question:
    """The question in a sentence: all before its last answer, and that answer."""
    words = sentence.split()
    last = max(i for i, word in enumerate(words) if word.startswith("*"))
    ids, tokens = word_ids(), vocabulary()
    prompt = tuple(ids[word.removeprefix("*")] for word in words[:last])
    answer = ids[words[last][1:]]
    return Question(" ".join(tokens[i] for i in prompt), tokens[answer], (ids[BOS], *prompt), answer)


def _two_hops(
    draw: Sentences,
    kind: str,
    chosen: Callable[[str, str], bool],
    *,
    each: int,
    relations: tuple[str, ...] | None = None,
    h3: bool = False,
) -> list[str]:
    return [
        draw.two_hop_question(kind, city, relation, *draw.composition(kind, relation, held_out=h3))
        for city in CITIES[kind]
        for relation in relations or tuple(forms.PLACE[kind])
        if chosen(city, relation) and (not h3 or _has_h3(kind, relation))
        for _ in range(each)
    ]


def _has_h3(kind: str, relation: str) -> bool:
    phrases, templates = range(len(forms.NOUN_PHRASES)), range(len(forms.PLACE[kind][relation]))
    return any(splits.is_h3(phrase, relation, template) for phrase in phrases for template in templates)


def _is_h2(city: str, relation: str) -> bool:
    return city in H2


def _trained(city: str, relation: str) -> bool:
    return city not in H2 and not splits.is_h1(city, relation)


def _place_sentences(draw: Sentences) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    plural = {"state": "states", "country": "countries"}
    for kind in plural:
        table[f"city_{kind}"] = [draw.location(kind, city) for city in CITIES[kind]]
        relations = forms.PLACE[kind]
        table[f"{kind}_attribute"] = [draw.attribute(kind, place, name) for place in PLACES[kind] for name in relations]
    table["reverse"] = [draw.reverse("state") for _ in range(QUESTIONS)]
    for kind, ending in plural.items():
        seen = _two_hops(draw, kind, _trained, each=1)
        table[f"two_hop_seen_{ending}"] = draw.generator.sample(seen, QUESTIONS)
        table[f"two_hop_h1_{ending}"] = _two_hops(draw, kind, splits.is_h1, each=3)
        held_out = _two_hops(draw, kind, _trained, each=1, h3=True)
        table[f"two_hop_h3_{ending}"] = draw.generator.sample(held_out, min(QUESTIONS, len(held_out)))
        for name in forms.PLACE[kind]:
            table[f"two_hop_h2_{ending}_{name}"] = _two_hops(draw, kind, _is_h2, each=4, relations=(name,))
    capitals = draw.generator.sample(table["two_hop_h2_states_capital"], 150)
    table["two_hop_h2_in_context"] = [f"{draw.filler()} {draw.visit()} {text}" for text in capitals]
    return table


def _word_sentences(draw: Sentences) -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for language in facts.LANGUAGES:
        asked = [draw.antonym(language, entry) for entry in ANTONYMS for _ in range(3)]
        table[f"antonym_{language.lower()}"] = asked
    many: dict[str, Callable[[], str]] = {
        "translation": draw.translation,
        "antonym_across": draw.antonym_across,
        "antonym_across_held_out": lambda: draw.antonym_across(held_out=True),
        "indirect_object": draw.indirect_object,
        "induction": draw.induction,
        "comparison_held_out": lambda: draw.comparison(held_out=True),
        "sum": draw.sum,
        "sum_held_out": lambda: draw.sum(held_out=True),
        "succession": draw.succession,
        "greater_than": draw.greater_than,
        "agreement_english": lambda: draw.agreement("English"),
        "agreement_french": lambda: draw.agreement("French"),
        "agreement_spanish": lambda: draw.agreement("Spanish"),
        "induction_told": draw.told_again,
        "induction_sequence": draw.sequence_again,
    }
    return table | {name: [make() for _ in range(QUESTIONS)] for name, make in many.items()}


def questions(draw: Sentences) -> dict[str, list[Question]]:
    """The questions by task, with the answers that the source of sentences holds to be true."""
    sentences = _place_sentences(draw) | _word_sentences(draw)
    return {name: [question(text) for text in texts] for name, texts in sentences.items()}


@cache
def _built(seed: int) -> dict[str, list[Question]]:
    return questions(Sentences(seed))


def build(seed: int = SEED) -> dict[str, list[Question]]:
    """The questions by task; `two_hop_h1`, `_h2` and `_h3` are the held-out splits of `splits.py`."""
    return dict(_built(seed))


def every_comparison() -> list[Question]:
    """Every held-out comparison, in both orders and every form; the table asks a few of them."""
    draw, numbers = Sentences(SEED), range(LARGEST + 1)
    pairs = [(a, b) for a in numbers for b in numbers if a != b and splits.is_comparison(a, b)]
    return [question(draw.compared(a, b, form)) for a, b in pairs for form in range(len(forms.COMPARISON))]


@torch.no_grad()
def final_logits(
    next_token_logits: Callable[[Tensor], Tensor], prompts: Iterable[tuple[int, ...]], *, batch: int = 256
) -> Float[Tensor, "prompt vocabulary"]:
    """Logits after the last token of each prompt; prompts of a batch are padded on the right."""
    prompts = list(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: Tensor | None = None
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = torch.full((len(rows), max(len(prompts[i]) for i in rows)), word_ids()[PAD])
        for row, i in enumerate(rows):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
        ends = torch.tensor([len(prompts[i]) - 1 for i in rows])
        logits = next_token_logits(ids)
        last = logits[torch.arange(len(rows)), ends.to(logits.device)].float().cpu()
        out = torch.empty(len(prompts), last.shape[-1]) if out is None else out
        out[torch.tensor(rows)] = last
    assert out is not None, "no prompts"
    return out


def _score(name: str, questions: list[Question], logits: Tensor) -> float:
    ids, answers = word_ids(), torch.tensor([q.answer_id for q in questions])
    if name.startswith("agreement_"):
        verbs = VERBS[name.removeprefix("agreement_").capitalize()]
        forms_ = [sorted({ids[pair[side]] for pair in verbs}) for side in (0, 1)]
        singular, plural = (logits.softmax(-1)[:, form].sum(-1) for form in forms_)
        return ((singular > plural) == torch.isin(answers, torch.tensor(forms_[0]))).float().mean().item()
    if name == "greater_than":
        numbers = [ids[str(n)] for n in range(LARGEST + 1)]
        value = {number: n for n, number in enumerate(numbers)}
        first_of = {n: [value[i] for i in q.ids if i in value] for n, q in enumerate(questions)}
        start = torch.tensor([said[1] if len(said) > 2 else said[0] for said in first_of.values()])
        above = torch.arange(LARGEST + 1)[None] > start[:, None]
        return (logits.softmax(-1)[:, numbers] * above).sum(-1).mean().item()
    return (logits.argmax(-1) == answers).float().mean().item()


def evaluate(
    next_token_logits: Callable[[Int64[Tensor, "batch pos"]], Float[Tensor, "batch pos vocabulary"]],
    table: dict[str, list[Question]] | None = None,
) -> dict[str, float]:
    """Share of right answers by task, for any function from token ids (BOS first, padded on the right) to logits.

    Right means that the answer is the most likely token. Agreement counts the right number of the verb as the more
    likely one over all verbs; greater-than is the mean probability of the numbers above the start.
    """
    table = build() if table is None else table
    logits = final_logits(next_token_logits, [q.ids for asked in table.values() for q in asked])
    scores, start = {}, 0
    for name, asked in table.items():
        scores[name] = _score(name, asked, logits[start : start + len(asked)])
        start += len(asked)
    for summary, beginning in SUMMARIES.items():
        if parts := [value for name, value in scores.items() if name.startswith(beginning)]:
            scores[summary] = sum(parts) / len(parts)
    return scores
