"""Pictures of figures: every site with figures is in them or named under them, all of it inside, without warnings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from circuits.plots import PANELS, _densities, _pareto, write_plots
from circuits.quality import Quality
from replacement.evaluation.comparison import BaselineFigures
from replacement.evaluation.reconstruction import DensityHistogram, ErrorFigures, FiringFigures
from replacement.evaluation.suite import DictionaryFigures, Evaluation, SiteFigures

pytest.importorskip("matplotlib")


def quality(
    name: str, layers: Sequence[int], sites: Sequence[int], *, kind: str = "transcoder", l0: float = 8, fvu: float = 0.1
) -> Quality:
    """Figures of a set with one dictionary filed under each layer, which write at the sites."""
    dead = 0 if l0 else 4
    histogram = DensityHistogram((-2.0, -1.0, 0.0), (0, 4 - dead), dead)
    firing = FiringFigures(n_features=4, l0=l0, dead=dead / 4, dense=0, tokens=10)
    read = tuple(DictionaryFigures(layer, kind, "mlp.hook_in", firing, histogram) for layer in layers)
    errors = ErrorFigures(fvu=fvu, nmse=fvu, cosine=0.5, tokens=10)
    written = tuple(SiteFigures(f"blocks.{layer}.mlp.hook_out", errors, None, None) for layer in sites)
    return Quality(name, (kind,), 10, Evaluation(read, written, None), None, None, None, None, None, ())


def drawn(figure: Any) -> tuple[list[str], str]:
    """Titles of the panels that show a set, and all that is written outside panels."""
    shown = [panel for panel in figure.axes if any(line.get_marker() in "osD^vP*X" for line in panel.lines)]
    return [panel.get_title() for panel in shown], "\n".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize(
    ("kind", "layers", "sites"),
    [("crosscoder", [1], [1, 2, 3]), ("cross_layer_transcoder", [1, 3], [1, 2, 3, 4, 5]), ("sae", [2], [2])],
)
def test_every_written_site_is_shown(kind: str, layers: list[int], sites: list[int]) -> None:
    titles, text = drawn(_pareto([quality("a", layers, sites, kind=kind)]))
    assert titles == [f"layer {layer}, mlp.hook_out" for layer in sites]
    missing = sorted(set(sites) - set(layers))
    said = f"a has no dictionary filed under layer {', '.join(map(str, missing))}"
    assert (said in text.replace("\n", " ")) is bool(missing)
    assert ("features of all lower layers too" in text.replace("\n", " ")) is (kind == "cross_layer_transcoder")


def test_what_has_no_room_is_named() -> None:
    layers = range(PANELS + 2)
    for draw, what in ((_pareto, "layer {}, mlp.hook_out"), (_densities, "layer {}")):
        figure = draw([quality("a", layers, layers)])
        text = "\n".join(one.get_text() for one in figure.texts)
        assert all(what.format(layer) in text.replace("\n", " ") for layer in (PANELS, PANELS + 1))
        assert what.format(PANELS - 1) not in text


@pytest.mark.parametrize("sites", [1, 2, 6])
def test_legend_and_caption_stay_inside(sites: int) -> None:
    """A figure of one panel is narrow, and a path as a name is long."""
    one = quality("a", [0], range(sites), kind="cross_layer_transcoder")
    beside = BaselineFigures(0, "blocks.0.mlp.hook_out", 8, 0.1, 0.4, 0.5, 0.3)
    several = [one._replace(name=f"/a/long/path/to/a/folder/of/one/of/many/seeds/{i}/dictionaries") for i in range(9)]
    for qualities in ([one._replace(baselines=(beside,))], several):
        figure = _pareto(qualities)
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        for part in (*figure.legends, *figure.texts):
            box = part.get_window_extent()
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        low = min(panel.get_tightbbox().y0 for panel in figure.axes if panel.get_visible())
        level = [text for text in figure.texts if not text.get_rotation()]
        assert all(text.get_window_extent().y1 <= low for text in level), "what is said lies under the panels"
        assert len(figure.legends[0].get_texts()) == (4 if len(qualities) == 1 else 9)


@pytest.mark.parametrize(("l0", "fvu"), [(0, 1.2), (3, math.nan), (3, 0.0), (3, 1e13), (3, 1e-12)])
def test_figures_at_the_edge_draw_without_warnings(tmp_path: Path, l0: float, fvu: float) -> None:
    """A set that never fires, a site that never varies, nothing missed, and more than any axis shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(write_plots([quality("a", [0], [0], l0=l0, fvu=fvu)], tmp_path)) == 4
    (panel,) = _pareto([quality("a", [0], [0], l0=l0, fvu=fvu)]).axes
    (lowest, highest), values = panel.get_ylim(), [line.get_ydata()[0] for line in panel.lines]
    assert all(lowest <= value <= highest for value in values)
    assert len(values) == (0 if math.isnan(fvu) else 1)
    assert ("no FVU" in panel.get_title()) is math.isnan(fvu)
