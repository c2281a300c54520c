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
    may take; fewer tokens are kept where they do not fit. Start tokens are left out where the splice keeps them.
    Raises `InputError` where there are fewer than two documents, or no other tokens in either half.
    """
    hooks = dict.fromkeys((*splice.reads, *splice.writes))
    values: dict[str, list[Tensor]] = {name: [] for name in hooks}
    labels: dict[str, list[Tensor]] = {name: [] for name in tasks or {}}
    lengths, wanted = list[int](), 0  # tokens of each document that count
    for ids in batches:
        found = splice.original(ids, hooks).values
        if not wanted:
            each = sum(value.shape[-1] * value.element_size() for value in found.values())
            wanted = max(2, min(tokens, memory // each) // max(1, ids.shape[1] - int(splice.keep_starts)))
        room = wanted - len(lengths)
        counted = splice.counted(ids[:room])
        for name, value in found.items():
            values[name].append(value[:room][counted].cpu())
        for task, labelling in (tasks or {}).items():
            labels[task].append(labelling(ids)[:room][counted.cpu()])
        lengths += counted.sum(1).tolist()
        if len(lengths) >= wanted:
            break
    if len(lengths) < 2:
        raise InputError(
            f"collect: got {len(lengths)} documents, needs 2 or more: one to fit on, another to measure on"
        )
    half = sum(lengths[: len(lengths) // 2])
    if not 0 < half < sum(lengths):
        raise InputError("collect: one half of the documents holds start tokens alone; pass more data")
    whole = Sample(*({name: torch.cat(parts) for name, parts in one.items()} for one in (values, labels)))
    return Halves(whole.part(slice(half)), whole.part(slice(half, None)))
