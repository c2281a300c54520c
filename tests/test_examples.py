"""Every example runs, on a toy model."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from graphs import AttributionGraph, read_neuronpedia
from tests.tiny import PROMPT

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("[0-9]*.py"))


def _main(number: int) -> Callable[[list[str]], None]:
    return runpy.run_path(str(next(path for path in EXAMPLES if path.name.startswith(f"{number:02d}"))))["main"]


@pytest.fixture
def toy(tiny_folder) -> list[str]:
    """The options that name a toy model."""
    return [PROMPT, "--model", str(tiny_folder("llama")), "--dictionaries", "neurons"]


def test_every_example_has_its_test():
    assert [path.name[:2] for path in EXAMPLES] == ["01", "02", "03", "04"]


def test_trace_and_read_back(toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _main(1)([*toy, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "rows add up" in said
    assert "replacement score 1.000" in said  # neurons miss nothing
    assert AttributionGraph.load(tmp_path / "graph.safetensors").prompt == PROMPT
    assert (tmp_path / "graph.dot").is_file()
    nodes = read_neuronpedia(tmp_path / "graph.json").n_nodes
    assert f"pruned to {nodes} nodes" in said

    _main(3)([str(tmp_path / "graph.json"), "--node-threshold", "0.3"])
    said = capsys.readouterr().out
    assert f"as published: {nodes} nodes" in said
    assert (tmp_path / "graph.dot").is_file()


def test_intervene(toy: list[str], capsys: pytest.CaptureFixture[str]):
    _main(2)([*toy, "--features", "3"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("answer: w")
    assert len(said) == 5
    influence = [float(line.split()[0]) for line in said[2:]]
    assert influence == sorted(influence, reverse=True)


def test_sparse_feature_circuit(toy: list[str], capsys: pytest.CaptureFixture[str]):
    _main(4)([*toy[1:], "--pair", "w3 w14 w15", "w3 w20 w15", "--answers", "w7", "w8"])
    said = capsys.readouterr().out.splitlines()
    effects = [abs(float(line.split()[0])) for line in said[1:9]]
    assert effects == sorted(effects, reverse=True)
    assert [int(line.split()[0]) for line in said[-4:]] == [3, 10, 30, 100]
