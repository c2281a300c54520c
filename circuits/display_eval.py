"""How the figures of dictionaries look on a terminal: a table a subject, or one table that compares sets.

Knows rich and the figures of `circuits.quality`; nothing of how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from circuits.display import FAINT, TITLE, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

    from circuits.quality import Quality
    from replacement.evaluation.suite import DictionaryFigures, SiteFigures

REPRESENTATIONS = ("features", "random", "neurons", "components", "difference in means", "raw")
NAMES = {"components": "PCA", "difference in means": "diff. of means", "raw": "logistic"}


def show_qualities(
    qualities: Sequence[Quality], *, model: str, data: str, files: Mapping[Path, str] | None = None, took: str = ""
) -> None:
    """Print the figures of one set in full, or of several side by side."""
    tokens = qualities[0].tokens
    names = ", ".join(one.name for one in qualities)
    parts: list[RenderableType] = [
        Group(Text(names, TITLE), Text(f"of {model}, on {tokens:,} held-out tokens of {data}", FAINT))
    ]
    parts += _full(qualities[0]) if len(qualities) == 1 else [_comparison(qualities)]
    notes = dict.fromkeys(note for one in qualities for note in one.notes)
    written = [f"written: {path}, {purpose}" for path, purpose in (files or {}).items()]
    closing = [Text(line, FAINT) for line in (*notes, *written, took) if line]
    emit(Group(*(Padding(part, (0, 0, 1, 0), expand=False) for part in parts), *closing))


def _full(quality: Quality) -> list[RenderableType]:
    sections: list[RenderableType] = [
        _section(
            "Reconstruction",
            _reconstruction(quality),
            "dead: fires at no token; dense: at more than 10 %; FVU: share of variance missed",
        )
    ]
    if quality.evaluation.replacement is not None:
        sections.append(_section("All sites replaced, no error terms", _all_replaced(quality)))
    if any(site.replacement for site in quality.evaluation.sites):
        text = "one site replaced, all others the model's own; then what the next layer makes of it"
        sections.append(_section("Each site alone", _single(quality.evaluation.sites), text))
    if quality.baselines:
        text = "FVU on another sample than it was fitted on; neurons: the L0 that write most"
        sections.append(_section("Beside what needs no dictionary, at the same L0", _baselines(quality), text))
    if quality.probes:
        text = "share of right answers of the best layer, chance 50 %; in brackets: columns that the probe reads"
        sections.append(_section("Probing", _probing(quality), text))
    if quality.absorption:
        text = "over letters that a probe on raw activations finds; full: one other feature in the letter's place"
        sections.append(_section("First-letter absorption", _absorption(quality), text))
    if quality.stability:
        text = "cosines of decoder rows of living features; shared: matched one to one with 0.7 or more"
        sections.append(_section("Stability", _stability(quality), text))
    if quality.graphs:
        sections.append(_section(f"Graphs of {len(quality.graphs.prompts)} prompts", _graphs(quality)))
    return sections


def _reconstruction(quality: Quality) -> Table:
    grid = _table(("site", "features", "L0", "dead", "dense", "FVU", "NMSE", "cosine"))
    dictionaries = {_layer(one): one for one in quality.evaluation.dictionaries}
    for site in quality.evaluation.sites:
        one, error = dictionaries.pop(int(site.site.split(".")[1]), None), site.reconstruction
        firing = ("", "", "", "") if one is None else _firing(one)
        grid.add_row(_short(site.site), *firing, _number(error.fvu), _number(error.nmse), _number(error.cosine))
    for layer, one in dictionaries.items():
        grid.add_row(f"L{layer} {one.reads}", *_firing(one), "", "", "")
    return grid


def _layer(one: DictionaryFigures) -> int:
    return one.layer


def _firing(one: DictionaryFigures) -> tuple[str, str, str, str]:
    firing = one.firing
    return f"{firing.n_features:,}", f"{firing.l0:.1f}", _percent(firing.dead), _percent(firing.dense)


def _all_replaced(quality: Quality) -> Table:
    figures = quality.evaluation.replacement
    assert figures is not None
    grid = _table(("", ""), head=False)
    grid.add_row("top-1 as the original's", _percent(figures.top1))
    grid.add_row("KL(original || replaced)", f"{_number(figures.kl)} nats")
    losses = f"{figures.ce_original:.3f} to {figures.ce_replaced:.3f}"
    grid.add_row("cross-entropy", f"{losses} nats ({figures.ce_ablated:.3f} with zeros instead)")
    grid.add_row("cross-entropy recovered", _percent(figures.ce_recovered))
    return grid


def _single(sites: Iterable[SiteFigures]) -> Table:
    grid = _table(("site", "top-1", "KL", "CE recovered", "next MLP: cosine", "NMSE", "next residual: cosine", "NMSE"))
    for site in sites:
        figures, after = site.replacement, site.downstream
        assert figures is not None
        errors = ("-",) * 4
        if after is not None:
            errors = tuple(_number(x) for one in after for x in (one.cosine, one.nmse))  # type: ignore[assignment]
        head = (_percent(figures.top1), _number(figures.kl), _percent(figures.ce_recovered))
        grid.add_row(_short(site.site), *head, *errors)
    return grid


def _baselines(quality: Quality) -> Table:
    grid = _table(("site", "L0", "dictionary", "linear, rank L0", "random encoder", "neurons"))
    for row in quality.baselines or ():
        neurons = "-" if row.neurons is None else _number(row.neurons)
        figures = (_number(row.dictionary), _number(row.components), _number(row.random), neurons)
        grid.add_row(_short(row.site), str(row.l0), *figures)
    return grid


def _probing(quality: Quality) -> Table:
    probes = quality.probes or ()
    columns = sorted(
        {(probe.representation, probe.k) for probe in probes if probe.k is None or probe.k > 1 or _is_feature(probe)},
        key=lambda column: (REPRESENTATIONS.index(column[0]), column[1] or 0),
    )
    heads = [NAMES.get(name, name) + ("" if k is None else f" ({k})") for name, k in columns]
    grid = _table(("property", *heads))
    for task in dict.fromkeys(probe.task for probe in probes):
        best = [
            max((p.accuracy for p in probes if (p.task, p.representation, p.k) == (task, *column)), default=math.nan)
            for column in columns
        ]
        grid.add_row(task, *(_percent(value) for value in best))
    return grid


def _is_feature(probe: object) -> bool:
    return getattr(probe, "representation", "") == REPRESENTATIONS[0]


def _absorption(quality: Quality) -> Table:
    grid = _table(("layer", "letters", "fraction", "full"))
    for layer, figures in quality.absorption or ():
        grid.add_row(f"L{layer}", str(len(figures.letters)), _number(figures.fraction), _number(figures.full))
    return grid


def _stability(quality: Quality) -> Table:
    grid = _table(("layer", "features", "nearest", "matched", "shared"))
    for layer, one in quality.stability or ():
        many = f"{one.features[0]:,}, {one.features[1]:,}"
        grid.add_row(f"L{layer}", many, _number(one.greedy), _number(one.matched), _percent(one.shared))
    return grid


def _graphs(quality: Quality) -> Table:
    scores = quality.graphs
    assert scores is not None
    grid = _table(("", ""), head=False)
    for name in ("replacement", "completeness"):
        value, error = getattr(scores, name), getattr(scores, f"{name}_error")
        grid.add_row(name, f"{value:.3f}" + ("" if math.isnan(error) else f" (standard error {error:.3f})"))
    return grid


def _comparison(qualities: Sequence[Quality]) -> Group:
    grid = _table(("set", "features", "L0", "dead", "FVU", "top-1", "KL", "CE rec.", "replacement", "completeness"))
    for one in qualities:
        evaluation, graphs = one.evaluation, one.graphs
        firing = [figures.firing for figures in evaluation.dictionaries]
        row = [
            f"{sum(figures.n_features for figures in firing):,}",
            f"{_mean(figures.l0 for figures in firing):.1f}",
            _percent(_mean(figures.dead for figures in firing)),
            _number(_mean(site.reconstruction.fvu for site in evaluation.sites)),
        ]
        lost = evaluation.replacement
        row += ["-"] * 3 if lost is None else [_percent(lost.top1), _number(lost.kl), _percent(lost.ce_recovered)]
        row += ["-"] * 2 if graphs is None else [f"{graphs.replacement:.3f}", f"{graphs.completeness:.3f}"]
        grid.add_row(one.name, *row)
    text = "features of all layers; L0, dead and FVU: means over layers; all sites replaced; --json has every figure"
    return _section("Sets side by side", grid, text)


def _section(title: str, body: RenderableType, text: str = "") -> Group:
    inside = Group(body, Text(text, FAINT)) if text else body
    return Group(Text(title, TITLE), Padding(inside, (0, 0, 0, 2), expand=False))


def _table(heads: Sequence[str], *, head: bool = True) -> Table:
    grid = Table(box=None, show_header=head, header_style=FAINT, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(heads):
        left = number == 0 or not head
        grid.add_column(name, justify="left" if left else "right", vertical="bottom", no_wrap=number == 0)
    return grid


def _short(site: str) -> str:
    _, layer, name = site.split(".", 2)
    return f"L{layer} {name}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.0095 or value == 0 else f"{value:.2g}"


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    value = 100 * share
    return f"{value:.1f} %" if value >= 0.1 or value <= 0 else "< 0.1 %"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
