"""A bounded sample of activations with labels: what baselines and probes are fitted on and measured on.

The first half of the documents is for fitting, the second for measuring. Memory is bounded by bytes that the caller
gives. Knows hooks by name and labels as numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.errors import InputError
from replacement.evaluation.splicing import Splice

Labelling = Callable[[Int[Tensor, "documents pos"]], Int[Tensor, "documents pos"]]
"""From token ids to labels: 1 where the property holds, 0 where it does not, -1 where the question does not arise."""


class Sample(NamedTuple):
    """Activations at the same tokens, on the CPU."""

    values: dict[str, Float[Tensor, "tokens width"]]  #: by full hook name
    labels: dict[str, Int[Tensor, " tokens"]]  #: by task: 1, 0, or -1 for neither

    def part(self, rows: slice | Int[Tensor, " rows"]) -> Sample:
        """The same of some tokens."""
        return Sample(*({name: value[rows] for name, value in one.items()} for one in self))


class Halves(NamedTuple):
    """Documents to fit on, and others to measure on."""

    fit: Sample
    test: Sample


def collect(
    splice: Splice,
    batches: Iterable[Int[Tensor, "documents pos"]],
    tasks: Mapping[str, Labelling] | None = None,
    *,
    tokens: int = 16384,
    memory: int = 512 * 2**20,
) -> Halves:
    """Activations at every hook that dictionaries read or write, of whole documents.

    batches: token ids, BOS first. tasks: labels by name. tokens: about how many to keep. memory: bytes that the sample
    may take; fewer tokens are kept where they do not fit. Position 0 is left out where the splice keeps it.
    Raises `InputError` where there are fewer than two documents.
    """
    hooks, first = dict.fromkeys((*splice.reads, *splice.writes)), int(splice.keep_first)
    values: dict[str, list[Tensor]] = {name: [] for name in hooks}
    labels: dict[str, list[Tensor]] = {name: [] for name in tasks or {}}
    documents, wanted = 0, 0
    for ids in batches:
        found = splice.original(ids, hooks).values
        if not wanted:
            each = sum(value.shape[-1] * value.element_size() for value in found.values())
            wanted = max(2, min(tokens, memory // each) // (ids.shape[1] - first))
        room = wanted - documents
        for name, value in found.items():
            values[name].append(value[:room, first:].cpu())
        for task, labelling in (tasks or {}).items():
            labels[task].append(labelling(ids)[:room, first:])
        documents += min(room, len(ids))
        if documents >= wanted:
            break
    if documents < 2:
        raise InputError(f"collect: got {documents} documents, needs 2 or more: one to fit on, another to measure on")
    whole = [{name: torch.cat(parts) for name, parts in one.items()} for one in (values, labels)]
    half = documents // 2
    cut = (slice(None, half), slice(half, None))
    return Halves(*(Sample(*({n: v[rows].flatten(0, 1) for n, v in one.items()} for one in whole)) for rows in cut))
