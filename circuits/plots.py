"""Pictures of dictionaries' figures, drawn with matplotlib: L0 against FVU, and how often features fire.

Every picture is written as PNG and as SVG. Knows figures and files; nothing of models.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from replacement.errors import InputError

if TYPE_CHECKING:
    from circuits.quality import Quality
    from replacement.evaluation.comparison import BaselineFigures

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c00")
MARKS = "osD^vP*X"
BASELINES = {"linear, of that rank": "+", "random encoder": "x", "strongest neurons": "_"}
LINES = ("-", "--", ":")
PANELS = 48
"""A picture holds no more panels; what is left out is said under it."""
SPREAD = ("cross_layer_transcoder", "causal_crosscoder")
"""Kinds whose features of several layers write one site together."""
LONGEST = 50
"""Letters of a set's name in a legend; of longer ones the end is shown."""
SUFFIXES = (".png", ".svg")
_DPI = 144


def require_place(folder: Path) -> None:
    """Raise InputError where matplotlib is not installed, or no file can be made in `folder`: before the long work.

    What had to be made to try is taken away again.
    """
    if find_spec("matplotlib") is None:
        raise InputError("--plots: matplotlib is not installed; pip install 'circuits[plots]', or leave --plots out")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--plots {str(folder)!r}: can't write there (it is a file); choose another place")
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".circuits-"):
            pass
        for place in missing:
            place.rmdir()
    except OSError as problem:
        raise _refusal(folder, problem) from problem


def write_plots(qualities: Sequence[Quality], folder: Path) -> dict[Path, str]:
    """Draw every picture into a folder; returns path -> what it shows. Raises InputError where it can't be written."""
    require_place(folder)
    pictures = {
        "pareto": (_pareto(qualities), "features a token (L0) against variance missed (FVU), a panel a site"),
        "densities": (_densities(qualities), "how often features fire, a panel a layer"),
    }
    written = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (figure, purpose) in pictures.items():
            for suffix in SUFFIXES:
                _write(figure, folder / f"{name}{suffix}")
                written[folder / f"{name}{suffix}"] = purpose
    except OSError as problem:
        raise _refusal(folder, problem) from problem
    return written


def _refusal(folder: Path, problem: OSError) -> InputError:
    reason = problem.strerror or problem
    return InputError(f"--plots {str(folder)!r}: can't write there ({reason}); choose another place")


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (smaller is better), by the first coordinate."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[index][1] < points[found[-1]][1]:
            found.append(index)
    return found


class _Point(NamedTuple):
    number: int  # of the set
    l0: float
    fvu: float


def _pareto(qualities: Sequence[Quality]) -> Any:
    """L0 against the FVU of each written site, and the front over all sets.

    L0 is that of the dictionary filed under the site's layer, or under the next lower layer that has one; where this is
    not all that writes there, it is said under the panels. Of one set, its baselines stand beside it.
    """
    points = _points(qualities)
    shown = dict(list(points.items())[:PANELS])
    baselines = (qualities[0].baselines or ()) if len(qualities) == 1 else ()
    names = [one.name for one in qualities]
    caption = _about_l0(qualities) + _left_out([_title(site) for site in points][PANELS:])
    levels = [point.fvu for of_site in shown.values() for point in of_site]
    limits = _limits(levels, beside=[value for row in baselines for value in _of_baseline(row).values()])
    if any(not limits[0] <= level <= limits[1] for level in levels if math.isfinite(level)):
        caption.append("What lies beyond the vertical axis is drawn on its edge.")
    figure, panels = _panels(
        len(shown),
        legend=names,
        titles=("features a token (L0)", "variance missed (FVU)"),
        marks=True,
        baselines=list(dict.fromkeys(name for row in baselines for name in _of_baseline(row))),
        caption=caption,
    )
    for panel, (site, of_site) in zip(panels, shown.items(), strict=False):
        drawn = [point for point in of_site if math.isfinite(point.fvu)]
        best = [(drawn[i].l0, drawn[i].fvu) for i in front([point[1:] for point in drawn])]
        if len(best) > 1:
            panel.step(*zip(*best, strict=True), where="post", color="#999999", linewidth=1, zorder=1)
        for number, x, y in drawn:  # what is beyond the axis stands on its edge
            inside = min(max(y, limits[0]), limits[1])
            panel.plot(x, inside, _mark(number), color=COLOURS[number % 8], markersize=7, zorder=2, clip_on=False)
        beside = [row for row in baselines if row.site == site]
        for row in beside:
            for name, value in _of_baseline(row).items():
                panel.plot(row.l0, value, BASELINES[name], color="#666666", markersize=7, zorder=2)
        _decades(panel, *limits)
        panel.set_xlim(0, 1.2 * max([*(point.l0 for point in of_site), *(row.l0 for row in beside)]) or 1.0)
        panel.set_title(_title(site) + ("" if drawn else "\nnever varies, so it has no FVU"), fontsize=10)
    return figure


def _points(qualities: Sequence[Quality]) -> dict[str, list[_Point]]:
    """Site -> a point a set that writes there, by layer."""
    found: dict[str, list[_Point]] = {}
    for number, one in enumerate(qualities):
        l0 = {figures.layer: figures.firing.l0 for figures in one.evaluation.dictionaries}
        for site in one.evaluation.sites:
            nearest = _reader(l0, _layer(site.site))
            found.setdefault(site.site, []).append(_Point(number, l0[nearest], site.reconstruction.fvu))
    return {site: found[site] for site in sorted(found, key=lambda site: (_layer(site), site))}


def _reader(layers: Iterable[int], layer: int) -> int:
    """The layer itself where a dictionary is filed under it, or the next lower one."""
    return max((one for one in layers if one <= layer), default=min(layers))


def _of_baseline(row: BaselineFigures) -> dict[str, float]:
    """Name in the legend -> FVU, where there is one."""
    found = zip(BASELINES, (row.components, row.random, row.neurons), strict=True)
    return {name: value for name, value in found if value is not None and math.isfinite(value)}


def _about_l0(qualities: Sequence[Quality]) -> list[str]:
    """What a reader would get wrong about the horizontal axis."""
    lines = []
    if spread := [one.name for one in qualities if set(one.kinds) & set(SPREAD)]:
        who = "each set" if len(spread) == len(qualities) > 1 else " and ".join(spread)
        lines.append(
            f"L0 counts the features of the site's own layer. What {who} writes there comes from the features of all "
            "lower layers too, which L0 leaves out."
        )
    for one in qualities:
        own = {figures.layer for figures in one.evaluation.dictionaries}
        if none := sorted({_layer(site.site) for site in one.evaluation.sites} - own):
            places = ", ".join(map(str, none))
            lines.append(
                f"{one.name} has no dictionary filed under layer {places}; L0 there is that of the nearest one below, "
                "which writes there too."
            )
    return lines


def _left_out(titles: Sequence[str]) -> list[str]:
    return [f"Left out, beyond {PANELS} panels: {'; '.join(titles)}."] if titles else []


def _densities(qualities: Sequence[Quality]) -> Any:
    """Features by the logarithm of their firing rate; features that never fire are said in words."""
    layers = sorted({figures.layer for one in qualities for figures in one.evaluation.dictionaries})
    caption = _left_out([f"layer {layer}" for layer in layers[PANELS:]])
    names = [one.name for one in qualities]
    titles = ("share of tokens at which a feature fires (dotted: dense from here on)", "features")
    figure, panels = _panels(min(PANELS, len(layers)), legend=names, titles=titles, marks=False, caption=caption)
    lowest = min(_lowest(figures.histogram) for one in qualities for figures in one.evaluation.dictionaries)
    for panel, layer in zip(panels, layers, strict=False):
        for number, one in enumerate(qualities):
            for figures in one.evaluation.dictionaries:
                if figures.layer == layer:
                    histogram, colour = figures.histogram, COLOURS[number % 8]
                    style = {"color": colour, "linewidth": 1.4, "linestyle": _line(number)}
                    panel.stairs(histogram.counts, histogram.edges, **style)
                    if len(qualities) == 1:
                        panel.stairs(histogram.counts, histogram.edges, color=colour, alpha=0.25, fill=True)
        dead = [f.histogram.dead for one in qualities for f in one.evaluation.dictionaries if f.layer == layer]
        between = "   " if len(dead) < 3 else "\n"
        panel.set_title(f"layer {layer}{between}never fire: {', '.join(f'{n:,}' for n in dead)}", fontsize=10)
        panel.axvline(-1, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_xlim(lowest, 0)
        ticks = range(int(lowest), 1)
        panel.set_xticks(list(ticks), [_rate(tick) for tick in ticks])
        panel.set_ylim(0, max(1.0, panel.get_ylim()[1]))
        panel.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _panels(
    count: int,
    *,
    legend: Sequence[str],
    titles: tuple[str, str],
    marks: bool,
    baselines: Sequence[str] = (),
    caption: Sequence[str] = (),
) -> tuple[Any, list[Any]]:
    """A figure with that many panels, a legend above them, and sentences below them."""
    from matplotlib.figure import Figure

    columns = max(1, min(3 if count <= 12 else 4 if count <= 24 else 6, count))
    rows = max(1, -(-count // columns))
    width = max(5.0, 3.4 * columns)
    lines = [line for said in caption for line in wrap(said, int(width / 0.066))]
    below = 0.15 * len(lines) + (0.1 if lines else 0)  # inches, as all sizes of figures
    figure = Figure(figsize=(width, 2.7 * rows + 0.9 + below), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    _legend(figure, legend, marks=marks, baselines=baselines)
    height = figure.get_figheight()
    if lines:  # the layout knows no captions, nor an axis title that is not at the edge
        inside = below + 0.25
        figure.set_layout_engine("constrained", rect=(0, inside / height, 1, 1 - inside / height))
        figure.text(0.1 / width, 0.06 / height, "\n".join(lines), fontsize=8, color="#444444", va="bottom")
    figure.supxlabel(titles[0], fontsize=10, **({"y": (below + 0.06) / height} if lines else {}))
    figure.supylabel(titles[1], fontsize=10)
    return figure, panels


def _legend(figure: Any, names: Sequence[str], *, marks: bool, baselines: Sequence[str]) -> None:
    """Above the panels, in as many columns as fit the figure's width, which grows in height for it."""
    from matplotlib.lines import Line2D
    from matplotlib.textpath import TextPath

    handles = [Line2D([], [], color=COLOURS[i % 8]) for i in range(len(names))]
    for i, handle in enumerate(handles):
        handle.set(**({"marker": _mark(i), "linestyle": ""} if marks else {"linestyle": _line(i)}))
    shown = [name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}" for name in names]
    handles += [Line2D([], [], color="#666666", marker=BASELINES[name], linestyle="") for name in baselines]
    shown += baselines
    widest = max(TextPath((0, 0), name, size=9).get_extents().width for name in shown) + 5 * 9  # points, with its mark
    columns = max(1, min(4, len(shown), int(72 * figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(shown) // columns) - 1))
    figure.legend(handles, shown, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _mark(number: int) -> str:
    return MARKS[(number + number // 8) % 8]  # another mark in a colour's second round


def _line(number: int) -> str:
    return LINES[number // 8 % len(LINES)]


def _limits(values: Sequence[float], *, beside: Sequence[float]) -> tuple[float, float]:
    """From under the decade of the smallest value to over the largest, and over 1; never below 1e-8 or above 100."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    lowest = math.floor(math.log10(min(known, default=0.1)))
    highest = max([1.0, *known, *filter(math.isfinite, beside)])
    return 0.7 * 10.0 ** max(-8, min(-1, lowest)), 1.3 * min(100.0, highest)


def _decades(panel: Any, lowest: float, highest: float) -> None:
    """A logarithmic axis with every whole decade."""
    from matplotlib.ticker import NullFormatter

    panel.set_yscale("log")
    panel.set_ylim(lowest, highest)
    ticks = [10.0**i for i in range(math.ceil(math.log10(lowest)), math.floor(math.log10(highest)) + 1)]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.yaxis.set_minor_formatter(NullFormatter())


def _lowest(histogram: Any) -> float:
    """The decade in which the rarest living feature fires."""
    filled = [edge for edge, count in zip(histogram.edges, histogram.counts, strict=False) if count]
    return float(min(-1, math.floor(min(filled, default=-1.0))))


def _rate(tick: int) -> str:
    return {0: "100 %", -1: "10 %", -2: "1 %", -3: "0.1 %", -4: "0.01 %"}.get(tick, f"$10^{{{tick}}}$")


def _layer(site: str) -> int:
    return int(site.split(".")[1])


def _title(site: str) -> str:
    _, layer, name = site.split(".", 2)
    return f"layer {layer}, {name}"


def _write(figure: Any, path: Path) -> None:
    """Draw into memory, then let the file appear whole."""
    buffer = BytesIO()
    options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": _DPI}
    figure.savefig(buffer, format=path.suffix[1:], **options)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        draft.write_bytes(buffer.getvalue())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
