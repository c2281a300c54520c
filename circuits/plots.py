"""Pictures of dictionaries' figures, drawn with matplotlib: L0 against FVU, and how often features fire.

Every picture is written as PNG and as SVG. Knows figures and files; nothing of models.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from replacement.errors import InputError

if TYPE_CHECKING:
    from circuits.quality import Quality

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c00")
MARKS = "osD^vP*X"
BASELINES = ("linear, of that rank", "random encoder", "strongest neurons")
BASELINE_MARKS = ("+", "x", "_")
PANELS, COLUMNS = 12, 3
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


def _pareto(qualities: Sequence[Quality]) -> Any:
    """L0 of the dictionary that reads a layer against the FVU of the site there, and the front over all sets.

    Of one set, its baselines stand beside it.
    """
    points: dict[str, list[tuple[int, float, float]]] = {}
    for number, one in enumerate(qualities):
        l0 = {figures.layer: figures.firing.l0 for figures in one.evaluation.dictionaries}
        for site in one.evaluation.sites:
            layer = int(site.site.split(".")[1])
            if layer in l0:
                points.setdefault(site.site, []).append((number, l0[layer], site.reconstruction.fvu))
    shown = dict(list(points.items())[:PANELS])
    baselines = (qualities[0].baselines or ()) if len(qualities) == 1 else ()
    figure, panels = _panels(len(shown), legend=[one.name for one in qualities], marks=True, baselines=bool(baselines))
    for panel, (name, of_site) in zip(panels, shown.items(), strict=False):
        best = [of_site[i][1:] for i in front([point[1:] for point in of_site])]
        if len(best) > 1:
            panel.step(*zip(*best, strict=True), where="post", color="#999999", linewidth=1, zorder=1)
        for number, x, y in of_site:
            panel.plot(x, y, MARKS[number % 8], color=COLOURS[number % 8], markersize=7, zorder=2)
        for row in baselines:
            if row.site == name:
                for mark, value in zip(BASELINE_MARKS, (row.components, row.random, row.neurons), strict=True):
                    if value is not None:
                        panel.plot(row.l0, value, mark, color="#666666", markersize=7, zorder=2)
        _decades(panel, [point[2] for one in shown.values() for point in one])
        panel.set_xlim(0, 1.2 * max([*(p[1] for p in of_site), *(row.l0 for row in baselines if row.site == name)]))
        panel.set_title(_title(name), fontsize=10)
    _axis_titles(figure, "features a token (L0)", "variance missed (FVU)")
    return figure


def _densities(qualities: Sequence[Quality]) -> Any:
    """Features by the logarithm of their firing rate; features that never fire are said in words."""
    layers = list(dict.fromkeys(figures.layer for one in qualities for figures in one.evaluation.dictionaries))
    figure, panels = _panels(min(PANELS, len(layers)), legend=[one.name for one in qualities], marks=False)
    lowest = min(_lowest(figures.histogram) for one in qualities for figures in one.evaluation.dictionaries)
    for panel, layer in zip(panels, layers, strict=False):
        for number, one in enumerate(qualities):
            for figures in one.evaluation.dictionaries:
                if figures.layer == layer:
                    histogram, colour = figures.histogram, COLOURS[number % 8]
                    panel.stairs(histogram.counts, histogram.edges, color=colour, linewidth=1.4)
                    if len(qualities) == 1:
                        panel.stairs(histogram.counts, histogram.edges, color=colour, alpha=0.25, fill=True)
        dead = [f.histogram.dead for one in qualities for f in one.evaluation.dictionaries if f.layer == layer]
        panel.set_title(f"layer {layer}   never fire: {', '.join(f'{n:,}' for n in dead)}", fontsize=10)
        panel.axvline(-1, color="#999999", linewidth=0.8, linestyle=":")
        panel.set_xlim(lowest, 0)
        ticks = range(int(lowest), 1)
        panel.set_xticks(list(ticks), [_rate(tick) for tick in ticks])
        panel.set_ylim(bottom=0)
    _axis_titles(figure, "share of tokens at which a feature fires (dotted: dense from here on)", "features")
    return figure


def _panels(count: int, *, legend: Sequence[str], marks: bool, baselines: bool = False) -> tuple[Any, list[Any]]:
    """A figure with that many panels, and a legend above them where there are several sets."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(1, min(COLUMNS, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(max(5.0, 3.4 * columns), 2.7 * rows + 0.9), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    handles = [
        Line2D([], [], color=COLOURS[i % 8], marker=MARKS[i % 8] if marks else "", linestyle="" if marks else "-")
        for i in range(len(legend))
    ]
    names = list(legend)
    if baselines:
        handles += [Line2D([], [], color="#666666", marker=mark, linestyle="") for mark in BASELINE_MARKS]
        names += BASELINES
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    return figure, panels


def _decades(panel: Any, values: Sequence[float]) -> None:
    """A logarithmic axis of whole decades up to 1, the same for all panels."""
    from matplotlib.ticker import NullFormatter

    lowest = math.floor(math.log10(min([value for value in values if value > 0], default=0.1)))
    lowest = max(-8, min(-1, lowest))
    panel.set_yscale("log")
    panel.set_ylim(0.7 * 10.0**lowest, max(1.2, 1.2 * max(values)))
    panel.set_yticks([10.0**i for i in range(lowest, 1)], [f"{10.0**i:g}" for i in range(lowest, 1)])
    panel.yaxis.set_minor_formatter(NullFormatter())


def _axis_titles(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def _lowest(histogram: Any) -> float:
    """The decade in which the rarest living feature fires."""
    filled = [edge for edge, count in zip(histogram.edges, histogram.counts, strict=False) if count]
    return float(min(-1, math.floor(min(filled, default=-1.0))))


def _rate(tick: int) -> str:
    return {0: "100 %", -1: "10 %", -2: "1 %", -3: "0.1 %", -4: "0.01 %"}.get(tick, f"$10^{{{tick}}}$")


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
