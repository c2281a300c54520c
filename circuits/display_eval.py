"""How the figures of dictionaries look on a terminal: a table a subject, or one table that compares sets.

Knows rich and the figures of `circuits.quality`; nothing of how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
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
NAMES = {"components": "PCA", "difference in means": "class\nmeans", "raw": "logistic"}
MATCHED = "cosines of decoder rows of features that fire; shared: matched one to one with 0.7 or more"


def show_qualities(
    qualities: Sequence[Quality],
    *,
    model: str,
    data: str,
    against: str | None = None,
    files: Mapping[Path, str] | None = None,
    took: str = "",
) -> None:
    """Print the figures of one set in full, or of several side by side.

    against: what stability was measured against. files: what was written (path -> what it shows).
    """
    emit(tables(qualities, model=model, data=data, against=against), *_closing(qualities, files or {}, took))


def tables(qualities: Sequence[Quality], *, model: str, data: str, against: str | None = None) -> Group:
    """Every table, with a title and what its columns mean. From 80 columns on no figure is broken; names may be."""
    tokens = qualities[0].tokens
    names = ", ".join(one.name for one in qualities)
    parts: list[RenderableType] = [
        Group(Text(names, TITLE), Text(f"of {model}, on {tokens:,} held-out tokens of {data}", FAINT))
    ]
    parts += _full(qualities[0], against) if len(qualities) == 1 else _comparison(qualities, against)
    return Group(*(Padding(part, (0, 0, 1, 0), expand=False) for part in parts))


def _closing(qualities: Sequence[Quality], files: Mapping[Path, str], took: str) -> list[Text]:
    notes: dict[str, list[str]] = {}
    for one in qualities:
        for note in one.notes:
            notes.setdefault(note, []).append(one.name)
    said = [note if len(of) == len(qualities) else f"{', '.join(of)}: {note}" for note, of in notes.items()]
    written = [f"written: {path}, {purpose}" for path, purpose in files.items()]
    return [Text(line, FAINT) for line in (*said, *written, took) if line]


def _full(quality: Quality, against: str | None) -> list[RenderableType]:
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
        text = (
            "one site replaced, all others the model's own; CE rec.: cross-entropy recovered; MLP, resid.: the next "
            "layer's MLP output and residual stream, against the original's"
        )
        sections.append(_section("Each site alone", _single(quality.evaluation.sites), text))
    if quality.baselines:
        text = "FVU on another sample than it was fitted on; neurons: the L0 that write most"
        sections.append(_section("Beside what needs no dictionary, at the same L0", _baselines(quality), text))
    if quality.probes:
        sections.append(_section("Probing: right answers in %", _probing(quality), _about_probes(quality)))
    if quality.absorption:
        text = "over letters that a probe on raw activations finds; full: one other feature in the letter's place"
        sections.append(_section("First-letter absorption", _absorption(quality), text))
    if quality.stability:
        sections.append(_section(_stable(against), _stability(quality), MATCHED))
    if quality.graphs:
        sections.append(_section(f"Graphs of {len(quality.graphs.prompts)} prompts", _graphs(quality)))
    return sections


def _reconstruction(quality: Quality) -> Table:
    grid = _table(("site", "features", "L0", "dead\n%", "dense\n%", "FVU", "NMSE", "cosine"))
    dictionaries = {one.layer: one for one in quality.evaluation.dictionaries}
    for site in quality.evaluation.sites:
        one, error = dictionaries.pop(int(site.site.split(".")[1]), None), site.reconstruction
        firing = ("",) * 4 if one is None else _firing(one)
        grid.add_row(_short(site.site), *firing, _number(error.fvu), _number(error.nmse), _number(error.cosine))
    for layer, one in dictionaries.items():
        grid.add_row(f"L{layer} {one.reads}", *_firing(one), "", "", "")
    return grid


def _firing(one: DictionaryFigures) -> tuple[str, ...]:
    firing = one.firing
    return f"{firing.n_features:,}", f"{firing.l0:.1f}", _share(firing.dead), _share(firing.dense)


def _all_replaced(quality: Quality) -> Table:
    figures = quality.evaluation.replacement
    assert figures is not None
    grid = _table(("", ""), head=False)
    grid.add_row("top-1 as the original's", f"{_share(figures.top1)} %")
    grid.add_row("KL(original || replaced)", f"{_number(figures.kl)} nats")
    losses = f"{figures.ce_original:.3f} to {figures.ce_replaced:.3f}"
    grid.add_row("cross-entropy", f"{losses} nats ({figures.ce_ablated:.3f} with zeros instead)")
    grid.add_row("cross-entropy recovered", f"{_share(figures.ce_recovered)} %")
    return grid


def _single(sites: Iterable[SiteFigures]) -> Table:
    heads = ("top-1\n%", "KL\nnats", "CE\nrec. %", "MLP\ncosine", "MLP\nNMSE", "resid.\ncosine", "resid.\nNMSE")
    grid = _table(("site", *heads))
    for site in sites:
        figures, after = site.replacement, site.downstream
        assert figures is not None
        errors = ("-",) * 4
        if after is not None:
            errors = tuple(_number(x) for one in after for x in (one.cosine, one.nmse))  # type: ignore[assignment]
        head = (_share(figures.top1), _number(figures.kl), _share(figures.ce_recovered))
        grid.add_row(_short(site.site), *head, *errors)
    return grid


def _baselines(quality: Quality) -> Table:
    grid = _table(("site", "L0", "dictionary", "linear,\nrank L0", "random\nencoder", "neurons"))
    for row in quality.baselines or ():
        neurons = "-" if row.neurons is None else _number(row.neurons)
        figures = (_number(row.dictionary), _number(row.components), _number(row.random), neurons)
        grid.add_row(_short(row.site), str(row.l0), *figures)
    return grid


def _probing(quality: Quality) -> Table:
    """Two rows a property where there are several layers: the best of them, and the median."""
    probes = quality.probes or ()
    columns = sorted(
        {(probe.representation, probe.k) for probe in probes if probe.k is None or probe.k > 1 or _is_feature(probe)},
        key=lambda column: (REPRESENTATIONS.index(column[0]), column[1] or 0),
    )
    heads = [NAMES.get(name, name) + ("" if k is None else f"\n({k})") for name, k in columns]
    grid = _table(("property", *heads))
    for task in dict.fromkeys(probe.task for probe in probes):
        of_task = [[p.accuracy for p in probes if (p.task, p.representation, p.k) == (task, *one)] for one in columns]
        grid.add_row(task, *(_share(max(values, default=math.nan)) for values in of_task))
        if max(map(len, of_task)) > 1:
            middle = (_share(median(values)) if values else "-" for values in of_task)
            grid.add_row(Text("  median layer"), *middle, style=FAINT)
    return grid


def _about_probes(quality: Quality) -> str:
    layers = len({probe.layer for probe in quality.probes or ()})
    columns = "in brackets: columns that the probe reads; class means: the line between them; logistic: all activations"
    if layers == 1:
        return f"chance is 50; {columns}"
    best = f"the best of {layers} layers, chosen on the tokens it is measured on, so chance is above 50; below it the"
    return f"{best} median layer, where chance is 50; {columns}"


def _is_feature(probe: object) -> bool:
    return getattr(probe, "representation", "") == REPRESENTATIONS[0]


def _absorption(quality: Quality) -> Table:
    grid = _table(("layer", "letters", "fraction", "full"))
    for layer, figures in quality.absorption or ():
        grid.add_row(f"L{layer}", str(len(figures.letters)), _number(figures.fraction), _number(figures.full))
    return grid


def _stable(against: str | None) -> str:
    return "Stability" if against is None else f"Stability against {against}"


def _stability(quality: Quality) -> Table:
    grid = _table(("layer", "features\nhere", "features\nthere", "nearest", "matched", "shared\n%"))
    for layer, one in quality.stability or ():
        many = (f"{number:,}" for number in one.features)
        grid.add_row(f"L{layer}", *many, _number(one.greedy), _number(one.matched), _share(one.shared))
    return grid


def _graphs(quality: Quality) -> Table:
    scores = quality.graphs
    assert scores is not None
    grid = _table(("", ""), head=False)
    for name in ("replacement", "completeness"):
        value, error = getattr(scores, name), getattr(scores, f"{name}_error")
        grid.add_row(name, f"{value:.3f}" + ("" if math.isnan(error) else f" (standard error {error:.3f})"))
    return grid


def _comparison(qualities: Sequence[Quality], against: str | None) -> list[RenderableType]:
    """Three short tables, not a wide one: what the sets are, what the model makes of them, how they repeat."""
    sets = _table(("set", "features", "L0", "dead\n%", "FVU"))
    for one in qualities:
        firing = [figures.firing for figures in one.evaluation.dictionaries]
        sets.add_row(
            one.name,
            f"{sum(figures.n_features for figures in firing):,}",
            f"{_mean(figures.l0 for figures in firing):.1f}",
            _share(_mean(figures.dead for figures in firing)),
            _number(_mean(site.reconstruction.fvu for site in one.evaluation.sites)),
        )
    text = "features of all layers; L0, dead and FVU: means over layers; --json has every figure"
    sections: list[RenderableType] = [_section("Sets side by side", sets, text)]
    if any(one.evaluation.replacement or one.graphs for one in qualities):
        text = "no error terms; CE rec.: cross-entropy recovered"
        text += (
            "; the last two: scores of graphs, which have error nodes" if any(one.graphs for one in qualities) else ""
        )
        sections.append(_section("The model with all sites replaced", _effects(qualities), text))
    if any(one.stability for one in qualities):
        stable = _table(("set", "layers", "nearest", "matched", "shared\n%"))
        for one in qualities:
            found = [layer.figures for layer in one.stability or ()]
            values = (_mean(figures.greedy for figures in found), _mean(figures.matched for figures in found))
            shared = _share(_mean(figures.shared for figures in found))
            stable.add_row(one.name, str(len(found)), *map(_number, values), shared)
        sections.append(_section(_stable(against), stable, f"means over layers; {MATCHED}"))
    return sections


def _effects(qualities: Sequence[Quality]) -> Table:
    scores = ("replacement", "completeness") if any(one.graphs for one in qualities) else ()
    grid = _table(("set", "top-1\n%", "KL\nnats", "CE\nrec. %", *scores))
    for one in qualities:
        lost = one.evaluation.replacement
        row = ["-"] * 3 if lost is None else [_share(lost.top1), _number(lost.kl), _share(lost.ce_recovered)]
        row += ["-" if one.graphs is None else f"{getattr(one.graphs, name):.3f}" for name in scores]
        grid.add_row(one.name, *row)
    return grid


def _section(title: str, body: RenderableType, text: str = "") -> Group:
    inside = Group(body, Text(text, FAINT)) if text else body
    return Group(Text(title, TITLE), Padding(inside, (0, 0, 0, 2), expand=False))


def _table(heads: Sequence[str], *, head: bool = True) -> Table:
    grid = Table(box=None, show_header=head, header_style=FAINT, padding=(0, 2, 0, 0), pad_edge=False)
    for number, name in enumerate(heads):
        justify, figures = "left" if number == 0 or not head else "right", (number > 0) == head
        grid.add_column(name, justify=justify, vertical="bottom", no_wrap=figures, overflow="fold")  # type: ignore[arg-type]
    return grid


def _short(site: str) -> str:
    _, layer, name = site.split(".", 2)
    return f"L{layer} {name}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if 0.0095 <= abs(value) < 1e5 or value == 0 else f"{value:.2g}"


def _share(share: float) -> str:
    """In percent, without the sign."""
    if math.isnan(share):
        return "-"
    value = 100 * share
    return f"{value:.1f}" if value >= 0.1 or value <= 0 else "<0.1"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan
