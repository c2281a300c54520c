"""What a dry run says: counts that are exact, estimates that are finite, and nothing traced or written."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from circuits import attribute, cli, preflight
from replacement import InputError, formats
from tests.tiny import PROMPT, random_set

KINDS = ["transcoder", "skip_transcoder", "cross_layer_transcoder", "neurons"]
SETTINGS = [
    {},
    {"max_features": None},
    {"max_features": 7, "batch_size": 2, "update_interval": 1},
    {"max_features": 0},
    {"targets": "w5", "position": 3},
    {"targets": "w5 - w6", "trace_bos": True},
    {"engine": "autograd"},
    {"position": 0},
]


def _expect(model, **settings) -> preflight.Preflight:
    return preflight.preflight(model, PROMPT, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_counts_are_those_of_the_trace_and_estimates_are_numbers(kind: str, settings: dict, tiny_model):
    model = tiny_model(kind=kind)
    expected = _expect(model, **settings)
    graph = attribute(model, PROMPT, **settings)
    assert expected.tokens == len(graph.tokens)
    assert expected.active_features == graph.n_active_features == sum(expected.features_by_layer)
    assert len(expected.features_by_layer) == 3
    traced = int(np.count_nonzero(graph.nodes.is_feature))
    assert expected.rows == len(graph.targets) + traced
    for value in (expected.seconds, expected.tracing_seconds, expected.finishing_seconds):
        assert 0 < value < math.inf
    assert expected.edges > 0
    assert expected.peak_bytes > expected.loaded_bytes > 0


def test_features_are_counted_in_the_layer_where_they_stand(tiny_model):
    model = tiny_model()
    layers = model.local(PROMPT).features.layer.tolist()
    assert _expect(model).features_by_layer == tuple(layers.count(layer) for layer in range(3))


@pytest.mark.parametrize("kind", ["transcoder", "cross_layer_transcoder"])
def test_edges_are_exact_where_the_sample_is_the_whole(kind: str, tiny_model, monkeypatch: pytest.MonkeyPatch):
    """With few features every row is sampled, and what is extrapolated is the sample itself."""
    monkeypatch.setattr(preflight, "SAMPLES", 1000)
    model = tiny_model(kind=kind)
    edges = attribute(model, PROMPT, max_features=None).n_edges
    assert _expect(model, max_features=None).edges == pytest.approx(edges, rel=0.01)


def test_more_rows_take_more_of_everything(tiny_model):
    model = tiny_model()
    few, many = (_expect(model, max_features=count, batch_size=4, update_interval=1) for count in (4, 60))
    assert few.rows < many.rows
    assert few.edges < many.edges
    assert few.rows_bytes < many.rows_bytes


@pytest.mark.parametrize(
    ("settings", "line"), [({"max_features": -1}, "must be 0 or more"), ({"targets": "w144"}, "'w144'")]
)
def test_mistakes_are_those_of_the_trace(settings: dict, line: str, tiny_model):
    with pytest.raises(InputError, match=line):
        _expect(tiny_model(), **settings)


def test_an_argument_that_attribute_lacks_is_refused(tiny_model):
    with pytest.raises(TypeError, match="colour"):
        _expect(tiny_model(), colour="red")


class Sizes:
    """What `random_set` asks of a model's configuration."""

    n_layers, d_model = 3, 24


def test_the_command_says_it_and_writes_nothing(
    tmp_path: Path, tiny_folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "dicts").mkdir()
    formats.save(random_set("llama", "transcoder", "relu", Sizes), tmp_path / "dicts", dtype="float32")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["trace", PROMPT, "--model", "model", "--dictionaries", "dicts", "--dry-run"]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert said.err == ""
    for words in ("tokens", "active features", "rows to compute", "time", "memory", "L2 "):
        assert words in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    assert cli.main([*command, "--json", "--max-features", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] == pytest.approx(answer["tracing_seconds"] + answer["finishing_seconds"])
    assert answer["active_features"] == sum(answer["features_by_layer"])
    assert sorted(tmp_path.rglob("*")) == before
