"""How time and memory of tracing grow with tokens, layers and active features: `python benchmarks/trace.py --scaling`.

Writes `trace_scaling.json` (raw figures and exponents) and `trace_scaling.png`. Knows this tool alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from trace_rows import Row, Settings, machine, make, run, write_json

FIGURES = {"cpu_seconds": "CPU seconds", "peak_bytes": "peak MB over the model"}


class Series(NamedTuple):
    """Rows that differ in one size."""

    sizes: tuple[int, ...]
    name: str  #: of a row, with a gap for the size
    goal: float | None  #: largest exponent of time


SERIES = {
    "tokens": Series((32, 64, 128, 256, 512), "6x256-{}-transcoder-500", 2.0),
    "layers": Series((3, 6, 9, 12), "{}x256-128-transcoder-500", None),
    "active features a token and layer": Series((10, 20, 40, 80, 160), "6x256-128-transcoder-500-{}", 1.1),
}


def exponents(sizes: list[int], values: list[float]) -> dict[str, float]:
    """Slopes of log value against log size: the least-squares line's, and between the two largest sizes."""
    x, y = np.log(sizes), np.log(values)
    return {"fit": float(np.polyfit(x, y, 1)[0]), "last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def scale(scratch: Path, settings: Settings, results: Path) -> None:
    """Run all series, print their exponents, and write both files."""
    content: dict[str, Any] = {"machine": machine(settings), "series": {}}
    for title, series in SERIES.items():
        measured: dict[int, dict[str, Any]] = {}
        for size in series.sizes:
            row = Row.parse(series.name.format(size))
            figures = run(row, "run_own_tracer.py", sys.executable, make(row, scratch), settings)
            print(f"{series.name.format(size)}: {figures}", file=sys.stderr)
            if "failed" not in figures:
                measured[size] = figures
        if len(measured) < 2:
            raise SystemExit(f"{title}: fewer than two sizes came to an end; raise --limit or --memory")
        content["series"][title] = {
            "rows": series.name,
            "goal": series.goal,
            "measured": measured,
            "exponents": {name: exponents(list(measured), _column(measured, name)) for name in FIGURES},
        }
        write_json(results / "trace_scaling.json", content)
    _print(content["series"])
    _draw(content["series"], results / "trace_scaling.png")


def _column(measured: dict[int, dict[str, Any]], name: str) -> list[float]:
    return [figures[name] for figures in measured.values()]


def _print(series: dict[str, Any]) -> None:
    table = Table(title="exponents: all sizes, last two")
    for name in ("against", "rows", "CPU seconds", "goal", "peak memory"):
        table.add_column(name)
    for title, one in series.items():
        seconds, memory = (one["exponents"][name] for name in FIGURES)
        cells = [f"{slope['fit']:.2f}, {slope['last']:.2f}" for slope in (seconds, memory)]
        table.add_row(title, one["rows"], cells[0], "" if one["goal"] is None else f"<= {one['goal']}", cells[1])
    Console(width=120).print(table)


def _draw(series: dict[str, Any], path: Path) -> None:
    """Measured points and fitted lines, a column a series; dashed is the goal, through the first point."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and looks for a display
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(4.2 * len(series), 6.4), layout="constrained")
    axes = figure.subplots(len(FIGURES), len(series), squeeze=False)
    for column, (title, one) in enumerate(series.items()):
        sizes = np.array(list(one["measured"]), dtype=float)
        for axis, (name, label) in zip(axes[:, column], FIGURES.items(), strict=True):
            values = np.array(_column(one["measured"], name)) / (1e6 if name == "peak_bytes" else 1)
            slope = one["exponents"][name]["fit"]
            line = np.exp(np.log(values).mean() + slope * (np.log(sizes) - np.log(sizes).mean()))
            axis.loglog(sizes, values, "o", color="#0072b2")
            axis.loglog(sizes, line, color="#0072b2", label=f"fit: size^{slope:.2f}")
            if one["goal"] is not None and name == "cpu_seconds":
                goal = values[0] * (sizes / sizes[0]) ** one["goal"]
                axis.loglog(sizes, goal, "--", color="#8c8c8c", label=f"goal: size^{one['goal']}")
            axis.set(xlabel=title, ylabel=label if column == 0 else "", xticks=sizes)
            axis.set_xticklabels([f"{size:.0f}" for size in sizes])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(draft, dpi=144)
    draft.replace(path)
