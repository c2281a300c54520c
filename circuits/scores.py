"""Replacement and completeness scores over a set of prompts: how much of a model's circuits dictionaries explain.

Ameisen et al. 2025 ("Circuit Tracing", on evaluating graphs); each prompt's graph is scored unpruned. Completeness runs
over all nodes, as circuit-tracer's does: tokens and errors have no inputs, so they count as explained. Knows graphs by
their scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from circuits.attribution import attribute
from graphs.influence import completeness_score, replacement_score
from replacement.errors import InputError
from replacement.model import ReplacementModel


class PromptScores(NamedTuple):
    """The scores of one prompt's whole graph."""

    replacement: float  #: `I_tok / (I_tok + I_err)`
    completeness: float  #: `sum_t (I_t + p_t)(1 - sum_err Â_te) / sum_t (I_t + p_t)`, t over all nodes


class GraphScores(NamedTuple):
    """The scores of many prompts' graphs."""

    replacement: float  #: mean over prompts
    completeness: float  #: mean over prompts
    replacement_error: float  #: standard error of that mean; NaN for one prompt
    completeness_error: float  #: standard error of that mean; NaN for one prompt
    prompts: tuple[PromptScores, ...]


def graph_scores(
    model: ReplacementModel,
    prompts: Iterable[str | Int[Tensor, " pos"]],
    *,
    max_features: int | None = 2000,
    progress: Callable[[int], None] | None = None,
) -> GraphScores:
    """The mean replacement and completeness score of the prompts' graphs, traced to their most probable next tokens.

    prompts: texts, or 1-D tensors of token ids. max_features: as `attribute` takes it. progress: called with 1 after
    each prompt. Raises `InputError` where there are no prompts, or one of them cannot be traced.
    """
    each = []
    for prompt in prompts:
        graph = attribute(model, prompt, max_features=max_features)
        each.append(PromptScores(replacement_score(graph), completeness_score(graph)))
        if progress is not None:
            progress(1)
    if not each:
        raise InputError("graph_scores: got no prompts, needs at least one")
    replacement, completeness = (_mean_and_error(values) for values in zip(*each, strict=True))
    return GraphScores(replacement[0], completeness[0], replacement[1], completeness[1], tuple(each))


def _mean_and_error(values: tuple[float, ...]) -> tuple[float, float]:
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, float("nan")
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
