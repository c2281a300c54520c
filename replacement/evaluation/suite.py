"""All figures of a set of dictionaries that one stream of documents gives: reconstruction, replacement, downstream.

The model is a bridge, the documents are token ids; each batch is run once as it is, once with each site replaced and
once ablated, and once with all of them. Nothing is kept but sums.

Start tokens, the first of a row and those between its documents, count in no figure where the splice keeps them, as
training leaves them out: activations are counted at all other tokens, predictions where neither the token that is read
nor the one that follows is a start token (what follows the end of a document is no matter of the model's). Tokens of
very high norm, which training leaves out too, do count: the replaced model has to do with them, and which they are
depends on the batch they come in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.downstream import DownstreamFigures, DownstreamMeter, next_hooks
from replacement.evaluation.reconstruction import (
    DensityHistogram,
    ErrorFigures,
    ErrorMeter,
    FiringFigures,
    FiringMeter,
)
from replacement.evaluation.replacement import ReplacementFigures, ReplacementMeter
from replacement.evaluation.splicing import Pass, Splice, encode, reconstruct

Progress = Callable[[int], None]


class DictionaryFigures(NamedTuple):
    """How often one dictionary's features fire."""

    layer: int  #: under which the set files it: the (first) layer that it reads
    kind: str
    reads: str  #: the (first) site that it reads
    firing: FiringFigures
    histogram: DensityHistogram


class SiteFigures(NamedTuple):
    """What dictionaries make of one written site."""

    site: str  #: full hook name
    reconstruction: ErrorFigures  #: all that write there together, from the original's activations
    replacement: ReplacementFigures | None  #: only this site replaced; None where it was not asked for
    downstream: DownstreamFigures | None  #: only this site replaced; None without a block after it, or not asked for


class Evaluation(NamedTuple):
    """Every figure of a set over one stream of documents."""

    dictionaries: tuple[DictionaryFigures, ...]
    sites: tuple[SiteFigures, ...]
    replacement: ReplacementFigures | None  #: all sites replaced; None where it was not asked for


def evaluate(
    splice: Splice,
    batches: Iterable[Int[Tensor, "documents pos"]],
    *,
    replace: bool = True,
    every_site: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Reconstruction of every written site, and the model with each of them replaced alone and with all replaced.

    batches: token ids, BOS first; start tokens count in no figure where the splice keeps them.
    replace: run the replaced model with all sites (KL, top-1, cross-entropy recovered).
    every_site: also with each site alone, and compare the next layer (two more passes a site).
    progress: called after each batch with its tokens.
    Raises `InputError` where there are no documents, or too short ones (`require_context`).
    """
    meters = _Meters(splice, replace=replace, every_site=replace and every_site)
    for tokens in batches:
        require_context(splice, tokens.shape[1], replace=replace)
        meters.update(tokens)
        if progress is not None:
            progress(tokens.numel())
    return meters.figures()


def require_context(splice: Splice, context: int, *, replace: bool) -> None:
    """Raise `InputError` where documents of so many tokens have none that counts, or, to replace, no next one."""
    least = 1 + int(splice.keep_starts) + int(replace)
    if context < least:
        why = "after the start token, " if splice.keep_starts else ""
        what = "a token and the one that follows" if replace else "a token"
        raise InputError(f"evaluate: got documents of {context} tokens; needs {least} or more: {why}{what}")


def firing(splice: Splice, batches: Iterable[Int[Tensor, "documents pos"]]) -> dict[int, FiringMeter]:
    """How often every feature fires, by the layer of its dictionary; start tokens are left out where the splice keeps
    them.

    batches: token ids, BOS first.
    """
    meters = {layer: FiringMeter(one.n_features) for layer, one in splice.dictionaries.by_layer.items()}
    for tokens in batches:
        values = splice.original(tokens, splice.reads).values
        counted = splice.counted(tokens)
        kept = {name: value[counted] for name, value in values.items()}
        for layer, activations in encode(splice.dictionaries, kept).items():
            meters[layer].update(activations)
    return meters


class _Meters:
    def __init__(self, splice: Splice, *, replace: bool, every_site: bool) -> None:
        self.splice, self.replace, self.every_site = splice, replace, every_site
        n_layers = len(splice.bridge.blocks)
        self.firing = {layer: FiringMeter(one.n_features) for layer, one in splice.dictionaries.by_layer.items()}
        self.error = {site: ErrorMeter() for site in splice.writes}
        self.single = {site: ReplacementMeter() for site in splice.writes}
        self.next = {site: found for site in splice.writes if (found := next_hooks(site, n_layers))}
        self.downstream = {site: DownstreamMeter() for site in self.next}
        self.all = ReplacementMeter()

    def update(self, tokens: Int[Tensor, "documents pos"]) -> None:
        splice = self.splice
        after = {name for pair in self.next.values() for name in pair} if self.every_site else set()
        clean = splice.original(tokens, {*splice.reads, *splice.writes, *after})
        counted = splice.counted(tokens)
        values = {name: value[counted] for name, value in clean.values.items()}
        encodings = encode(splice.dictionaries, values)
        for layer, meter in self.firing.items():
            meter.update(encodings[layer])
        for site, error in self.error.items():
            error.update(values[site], reconstruct(splice.dictionaries, site, values, encodings))
        if self.replace:
            self._compare(self.all, tokens, clean, splice.replaced(tokens), splice.ablated(tokens))
        for site in splice.writes if self.every_site else ():
            downstream = self.next.get(site, ())
            ours = splice.replaced(tokens, [site], downstream)
            self._compare(self.single[site], tokens, clean, ours, splice.ablated(tokens, [site]))
            if downstream:
                first, second = (ours.values[name][counted] for name in downstream)
                self.downstream[site].update((values[downstream[0]], values[downstream[1]]), (first, second))

    def _compare(
        self, meter: ReplacementMeter, tokens: Int[Tensor, "documents pos"], clean: Pass, ours: Pass, none: Pass
    ) -> None:
        """Predictions where both tokens count, the one that is read and the one that follows."""
        counted = self.splice.counted(tokens)
        both = counted[:, :-1] & counted[:, 1:]
        original, replaced, ablated = (one.logits[:, :-1][both] for one in (clean, ours, none))
        meter.update(original, replaced, ablated, tokens[:, 1:].to(both.device)[both])

    def figures(self) -> Evaluation:
        dictionaries: DictionarySet = self.splice.dictionaries
        return Evaluation(
            tuple(
                DictionaryFigures(layer, one.kind, one.read, meter.figures(), meter.histogram())
                for layer, one in sorted(dictionaries.by_layer.items())
                for meter in (self.firing[layer],)
            ),
            tuple(
                SiteFigures(
                    site,
                    self.error[site].figures(),
                    self.single[site].figures() if self.every_site else None,
                    self.downstream[site].figures() if self.every_site and site in self.downstream else None,
                )
                for site in self.splice.writes
            ),
            self.all.figures() if self.replace else None,
        )
