"""Everything that is measured of a set of dictionaries: which measures there are, and what each of them needs.

The figures themselves are defined in `replacement.evaluation` and `circuits.scores`. Knows nothing of how a report
looks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.measures import MEASURES
from circuits.scored_prompts import require_prompts
from circuits.scores import GraphScores, graph_scores
from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.evaluation.absorption import AbsorptionFigures
from replacement.evaluation.comparison import BaselineFigures, ProbeFigures, compare_probes, compare_reconstruction
from replacement.evaluation.sample import Labelling, collect
from replacement.evaluation.splicing import Splice
from replacement.evaluation.stability import StabilityFigures, shared_layers, stability, write_directions
from replacement.evaluation.suite import Evaluation, evaluate, firing, require_context
from replacement.evaluation.words import evaluate_absorption
from replacement.model import ReplacementModel
from replacement.neurons import neurons
from replacement.starts import start_token, start_tokens

PROMPT_TOKENS = 24
"""Prompts that are beginnings of documents are cut there."""

BLOCK = 64
"""Documents are drawn so many at once."""

Advance = Callable[[str, int, int], None]


class Documents:
    """Documents of token ids in batches, the same whenever they are gone through."""

    def __init__(
        self, source: Any, *, tokens: int, vocabulary: int, features: int = 0, memory: int = 512 * 2**20
    ) -> None:
        """Take a token source and how many tokens to read.

        vocabulary, features: what a token takes room for: the logits of three models, and all activations of a set.
        memory: bytes that these may take for a batch.
        Raises `InputError` where the source holds no document.
        """
        self.source, self.context = source, source.context
        self.documents = max(2, tokens // source.context)
        if source.n_documents is not None:
            self.documents = min(self.documents, source.n_documents)
        if self.documents < 2:
            raise InputError(
                f"eval: got {self.documents} documents of {source.context} tokens, needs 2 or more; "
                "pass more data, or a smaller context"
            )
        self.tokens = self.documents * source.context
        self.batch = max(1, min(BLOCK, memory // (source.context * (6 * 8 * vocabulary + 3 * 4 * features))))

    def __iter__(self) -> Iterator[Int[Tensor, "documents pos"]]:
        """Batches of documents, of `batch` or fewer.

        Drawn in blocks of one size, as a source may draw each block from a seed of its own: which documents they are
        must not depend on how many of them fit in memory, or sets of different size could not be compared.
        """
        for index in range(-(-self.documents // BLOCK)):
            block = self.source.batch(index, BLOCK)[: self.documents - index * BLOCK]
            yield from block.split(self.batch)

    def beginnings(self, prompts: int, start: int | None = None) -> list[Int[Tensor, " pos"]]:
        """The first tokens of documents, as prompts; each ends before the next start token, of the id `start`."""
        found: list[Tensor] = []
        for tokens in self:
            rows = tokens[:, :PROMPT_TOKENS]
            ends = start_tokens(rows, start)[:, 1:].int().cumsum(1).eq(0).sum(1) + 1
            found += [row[:end] for row, end in zip(rows, ends.tolist(), strict=True) if end > 1]
            if len(found) >= prompts:
                break
        return found[:prompts]


class LayerAbsorption(NamedTuple):
    """First-letter absorption of one dictionary."""

    layer: int
    figures: AbsorptionFigures


class LayerStability(NamedTuple):
    """Features of one dictionary against those of the dictionary of the same layer in the other set."""

    layer: int
    figures: StabilityFigures


class Quality(NamedTuple):
    """Everything measured of one set; None for what was not asked for, or can't be measured of this kind."""

    name: str
    kinds: tuple[str, ...]
    tokens: int
    evaluation: Evaluation
    baselines: tuple[BaselineFigures, ...] | None
    probes: tuple[ProbeFigures, ...] | None
    absorption: tuple[LayerAbsorption, ...] | None
    graphs: GraphScores | None
    stability: tuple[LayerStability, ...] | None
    notes: tuple[str, ...]  #: what was left out, and why


def measure(
    bridge: Any,
    dictionaries: DictionarySet,
    documents: Documents,
    *,
    model: str,
    measures: Collection[str] = tuple(MEASURES),
    against: DictionarySet | None = None,
    prompts: Sequence[str | Int[Tensor, " pos"]] | None = None,
    tasks: Mapping[str, Labelling] | None = None,
    replace_first: bool = False,
    advance: Advance | None = None,
) -> Quality:
    """Measure a set of dictionaries on held-out documents.

    bridge: a TransformerBridge. measures: names from `MEASURES`. against: a set trained with another seed, for
    stability. prompts: for graphs' scores (None: beginnings of documents). tasks: labels for probing (None: no
    probing). replace_first: replace start tokens, at position 0 and inside of rows, like any other. advance: called
    with (what, done, total).
    Raises `InputError`, before any of the long work, for an unknown measure, where the dictionaries do not fit the
    model, those of `against` are of other sites, a prompt can't be read, or documents are too short.
    """
    if unknown := [name for name in measures if name not in MEASURES]:
        raise InputError(f"measure(measures={unknown[0]!r}): no such measure; have {', '.join(MEASURES)}")
    splice = Splice(bridge, dictionaries, keep_starts=not replace_first)
    say, notes = advance or (lambda what, done, total: None), list[str]()
    require_context(splice, documents.context, replace=bool({"replacement", "sites"} & set(measures)))
    if against is not None:
        shared_layers(dictionaries, against)
    if prompts and "graphs" in measures:
        require_prompts(prompts, bridge, name=model)
    evaluation = _evaluate(splice, documents, measures, say)
    baselines, probes, note = _sampled(splice, documents, tasks, measures, say)
    notes += note
    absorption = graphs = steady = None
    if "absorption" in measures:
        say("absorption", 0, 1)
        absorption, note = _absorption(splice)
        notes += note
    if "graphs" in measures:
        start = None if bridge.tokenizer is None else start_token(bridge.tokenizer)
        graphs, note = _graphs(bridge, dictionaries, model, prompts or documents.beginnings(20, start), say)
        notes += note
    if against is not None:
        say("stability", 0, 1)
        theirs = Splice(bridge, against, keep_starts=not replace_first)
        steady, note = _stability(splice, theirs, documents)
        notes += note
    return Quality(
        dictionaries.name,
        tuple(dict.fromkeys(one.kind for one in dictionaries)),
        documents.tokens,
        evaluation,
        baselines,
        probes,
        absorption,
        graphs,
        steady,
        tuple(notes),
    )


def _evaluate(splice: Splice, documents: Documents, measures: Collection[str], say: Advance) -> Evaluation:
    done = 0

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        say("running the model", done, documents.tokens)

    say("running the model", 0, documents.tokens)
    wanted = {name: name in measures for name in ("replacement", "sites")}
    return evaluate(splice, documents, replace=any(wanted.values()), every_site=wanted["sites"], progress=progress)


def _sampled(
    splice: Splice,
    documents: Documents,
    tasks: Mapping[str, Labelling] | None,
    measures: Collection[str],
    say: Advance,
) -> tuple[tuple[BaselineFigures, ...] | None, tuple[ProbeFigures, ...] | None, list[str]]:
    """Baselines and probes, from one sample of activations."""
    if not {"baselines", "probing"} & set(measures):
        return None, None, []
    halves, own = collect(splice, documents, tasks, tokens=documents.tokens), _neurons(splice.bridge)
    baselines = None
    if "baselines" in measures:
        say("baselines", 0, 1)
        baselines = tuple(compare_reconstruction(splice.dictionaries, halves, own))
    if "probing" not in measures:
        return baselines, None, []
    say("probing", 0, 1)
    probes = tuple(compare_probes(splice.dictionaries, halves, own)) or None
    missing = "probing: no labels for this data with enough examples of both kinds; pass --labels"
    return baselines, probes, [missing] if probes is None else []


def _neurons(bridge: Any) -> Mapping[int, Dictionary] | None:
    dtype = torch.float64 if next(bridge.parameters()).dtype == torch.float64 else torch.float32
    try:
        found = neurons(bridge, dtype).by_layer
    except InputError:  # the architecture does not show its MLPs' weights
        return None
    for one in found.values():
        one.requires_grad_(False)
    return found


def _absorption(splice: Splice) -> tuple[tuple[LayerAbsorption, ...] | None, list[str]]:
    try:
        found = tuple(LayerAbsorption(layer, figures) for layer, figures in evaluate_absorption(splice).items())
    except InputError as reason:
        return None, [str(reason)]
    if any(one.figures.letters for one in found):
        return found, []
    return None, ["absorption: no probe finds first letters in what this model writes, so none can be absorbed"]


def _graphs(
    bridge: Any, dictionaries: DictionarySet, name: str, prompts: Sequence[str | Tensor], say: Advance
) -> tuple[GraphScores | None, list[str]]:
    try:
        model = ReplacementModel(bridge, dictionaries, name=name)
    except InputError as reason:
        return None, [f"graphs: {reason}"]
    done = 0

    def progress(prompts_done: int) -> None:
        nonlocal done
        done += prompts_done
        say("tracing prompts", done, len(prompts))

    say("tracing prompts", 0, len(prompts))
    return graph_scores(model, prompts, progress=progress), []


def _stability(
    ours: Splice, theirs: Splice, documents: Documents
) -> tuple[tuple[LayerStability, ...] | None, list[str]]:
    """By layer, over features that fire in the documents; a layer where none does is a note."""
    first, second = (firing(splice, documents) for splice in (ours, theirs))
    found, notes = [], []
    for layer in shared_layers(ours.dictionaries, theirs.dictionaries):
        rows = [write_directions(one.dictionaries.by_layer[layer]) for one in (ours, theirs)]
        alive = [torch.nonzero(meters[layer].fired).flatten() for meters in (first, second)]
        try:
            found.append(LayerStability(layer, stability(rows[0], rows[1], alive_a=alive[0], alive_b=alive[1])))
        except InputError as reason:
            notes.append(f"{theirs.dictionaries.name}, layer {layer}: {reason}")
    return tuple(found) or None, notes
