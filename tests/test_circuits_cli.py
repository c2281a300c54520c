"""The command line: what it prints and writes, its defaults are the library's, and every mistake is one line."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuits import attribute, cli
from circuits.defaults import default
from graphs import AttributionGraph, prune, read_neuronpedia, upload_problems
from replacement import ReplacementModel, formats
from tests.tiny import CONTEXT, PROMPT, random_set


class Sizes:
    """What `random_set` asks of a model's configuration."""

    n_layers, d_model = 3, 24


@pytest.fixture
def place(tmp_path: Path, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a tiny model and its dictionaries in it."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    dictionaries = random_set("llama", "transcoder", "relu", Sizes)
    labels = {0: dict.fromkeys(range(30), "Texas"), 2: dict.fromkeys(range(30), "say Austin")}
    labelled = type(dictionaries)(dictionaries.by_layer, "random", labels)
    (tmp_path / "dicts").mkdir()
    formats.save(labelled, tmp_path / "dicts", dtype="float32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRACE = ["trace", PROMPT, "--model", "model", "--dictionaries", "dicts"]


@pytest.fixture
def traced(place: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a finished trace."""
    assert cli.main([*TRACE, "-o", "out"]) == 0
    capsys.readouterr()
    return place / "out"


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- what it does


def test_trace_reports_in_words_and_writes_whole_files(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(TRACE) == 0
    said = capsys.readouterr()
    for words in ("next token", "replacement", "completeness", "error share", "largest relative error", '"Texas" (L0'):
        assert words in said.out
    assert said.err == ""
    assert max(map(len, said.out.splitlines())) <= 100
    assert "\x1b" not in said.out, "colours without a terminal"
    folder = place / "circuits-out" / "w3-w14-w15-w9-w26-w5-w35"
    pictures = {"graph.svg"} if shutil.which("dot") else set()
    assert _files(folder) == {"graph.json", "graph.dot", "graph.safetensors"} | pictures
    whole = AttributionGraph.load(folder / "graph.safetensors")
    assert "pruning" not in whole.settings
    document = json.loads((folder / "graph.json").read_text())
    assert upload_problems(document) == []
    assert document["metadata"]["slug"] == folder.name
    assert (folder / "graph.dot").read_text().startswith("//")
    assert read_neuronpedia(folder / "graph.json").n_nodes == prune(whole).n_nodes


def test_json_is_one_object_and_nothing_else(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*TRACE, "--json", "--format", "native"]) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert said.err == ""
    assert sorted(answer) == [
        "active_features", "dictionaries", "dropped_share", "files", "linearised", "model", "predictions",
        "products_error", "prompt", "pruned", "residual", "routes", "seconds", "settings", "sources", "targets",
        "themes", "thresholds", "tokens", "whole",
    ]  # fmt: skip
    assert Path(answer["files"]["native"]).is_file()
    probabilities = [one["probability"] for one in answer["predictions"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert answer["routes"][0]["words"].startswith(answer["routes"][0]["steps"][0]["words"])


def test_trace_is_the_library(place: Path):
    """The command gives the graph that the Python API gives, with the same defaults."""
    assert cli.main([*TRACE, "-o", "out", "--format", "native"]) == 0
    graph = attribute(ReplacementModel.load("model", dictionaries="dicts"), PROMPT)
    graph.save("library.safetensors")
    assert Path("out/graph.safetensors").read_bytes() == Path("library.safetensors").read_bytes()


def test_targets_and_settings_reach_the_library(place: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--target", "w5", "--target", "w7 - w8", "--position", "4", "--max-features", "20", "--trace-bos"]
    assert cli.main([*TRACE, *options, "--dtype", "float64", "--engine", "autograd", "--json", "-o", "out"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["token"] for one in answer["targets"]] == ["w5", "w7 - w8"]
    assert len(answer["tokens"]) == 5  # what comes after position 4 cannot matter
    assert answer["whole"]["features"] == 20
    assert answer["settings"]["engine"] == "autograd"
    assert answer["settings"]["dtype"] == "float64"
    assert answer["settings"]["trace_bos"] is True


def test_what_was_dropped_is_said(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*TRACE, "--drop", "0.05", "--json", "-o", "out"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["settings"]["drop"] == 0.05
    assert 0.04 < answer["dropped_share"] == answer["settings"]["dropped_share"] <= 0.05 * (1 + 1e-9)
    assert cli.main(["show", "out/graph.safetensors"]) == 0
    assert "the smallest left out, at most 5.0% of a node's inputs" in capsys.readouterr().out
    assert cli.main([*TRACE, "--drop", "5"]) == 2
    assert "attribute(drop=5.0): must be in [0, 1); for 0.1 percent of every row pass 0.001" in capsys.readouterr().err


def test_defaults_are_the_librarys():
    """Every option that a library function has too starts at that function's own default."""
    arguments = vars(cli.parser().parse_args(["trace", "some words"]))
    checked = set()
    for call, function in (
        ("circuits.attribution:attribute", attribute),
        ("replacement.model:ReplacementModel.load", ReplacementModel.load),
        ("graphs.pruning:prune", prune),
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in arguments and parameter.default is not parameter.empty:
                assert arguments[name] == parameter.default == default(call, name)
                checked.add(name)
    own = {"prompt", "prompts", "dry_run", "resume", "command", "version", "json", "output", "format", "target"}
    assert checked == set(arguments) - own


def test_default_says_what_is_missing():
    with pytest.raises(LookupError, match="no such argument"):
        default("graphs.pruning:prune", "colour")
    with pytest.raises(LookupError, match="has no pruned"):
        default("graphs.pruning:pruned", "node_threshold")


@pytest.mark.parametrize("file", ["graph.safetensors", "graph.json"])
def test_show_says_of_a_stored_graph_what_trace_said(file: str, traced: Path, capsys: pytest.CaptureFixture[str]):
    whole = AttributionGraph.load(traced / "graph.safetensors")
    assert cli.main(["show", str(traced / file), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["pruned"]["nodes"] == prune(whole).n_nodes
    assert (answer["whole"] is None) == (file == "graph.json")  # a viewer's file holds the pruned graph
    assert cli.main(["show", str(traced / file)]) == 0
    assert "Strongest routes" in capsys.readouterr().out


def test_prune_writes_the_format_of_the_suffix(traced: Path, capsys: pytest.CaptureFixture[str]):
    source = str(traced / "graph.safetensors")
    assert cli.main(["prune", source, "--node-threshold", "0.5"]) == 0
    pruned = AttributionGraph.load(traced / "graph-pruned.safetensors")
    assert pruned.settings["pruning"]["node_threshold"] == 0.5
    assert cli.main(["prune", source, "--node-threshold", "0.5", "-o", "new/small.json", "--json"]) == 0
    assert read_neuronpedia("new/small.json").n_nodes == pruned.n_nodes
    assert json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["files"] == {
        "json": "new/small.json"
    }


def test_export_writes_what_trace_would_have_written(traced: Path, capsys: pytest.CaptureFixture[str]):
    source = str(traced / "graph.safetensors")
    assert cli.main(["export", source, "--format", "json,dot,graphml", "-o", "again", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["graphml"] == "again/graph.graphml"
    assert json.loads(Path("again/graph.json").read_text()) == json.loads((traced / "graph.json").read_text())
    assert Path("again/graph.dot").read_text() == (traced / "graph.dot").read_text()
    assert cli.main(["export", source, "--format", "json", "-o", "whole", "--whole"]) == 0
    assert len(json.loads(Path("whole/graph.json").read_text())["nodes"]) == AttributionGraph.load(source).n_nodes


def test_models_lists_what_ships(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["models"]) == 0
    assert "atlas" in capsys.readouterr().out
    assert cli.main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "atlas"


def test_bare_command_and_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("circuits ")
    for name in cli.COMMANDS:
        with pytest.raises(SystemExit) as left:
            cli.main([name, "--help"])
        assert left.value.code == 0
        assert name in capsys.readouterr().out


def test_without_graphviz_a_trace_says_so_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert cli.main([*TRACE, "-o", "out"]) == 0
    assert "no picture: Graphviz is not installed" in capsys.readouterr().out
    assert _files(place / "out") == {"graph.json", "graph.dot", "graph.safetensors"}


# ---- mistakes


def _damaged(place: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(place / name)
    change(tensors)
    save_file(tensors, place / name, metadata={"format": "pt"})


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)] = tensors[min(tensors)] * float("nan")


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {"W_enc": tensors["W_enc"][:, :20].clone(), "W_dec": tensors["W_dec"][:, :20].clone()}
    tensors["b_dec"] = tensors["b_dec"][:20].clone()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _first_dictionary(place: Path) -> str:
    return str(min((place / "dicts").glob("*.safetensors")).relative_to(place))


def _no_graphviz(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)


OUT = ["-o", "out"]
NOTHING = None
MISTAKES = {
    # what is wrong: (what happens to the folder first, the command, what the line says)
    "empty prompt": (NOTHING, ["trace", "", *TRACE[2:]], "prompt: is empty; give at least one word"),
    "blank prompt": (NOTHING, ["trace", "  ", *TRACE[2:]], "prompt: is empty; give at least one word"),
    "unknown word": (NOTHING, ["trace", "w3 w144", *TRACE[2:]], "'w144' is not in the vocabulary of model; near: w44,"),
    "unknown word of atlas": (NOTHING, ["trace", "the capital of Texass", "--dictionaries", "neurons"], "near: Texas"),
    "past the context": (NOTHING, ["trace", "w3 " * CONTEXT, *TRACE[2:]], f"takes at most {CONTEXT}; shorten it"),
    "unknown model": (NOTHING, ["trace", PROMPT, "--model", "./nowhere"], "no such directory; pass a directory"),
    "a folder without a model": (NOTHING, ["trace", PROMPT, "--model", "dicts"], "cannot be loaded"),
    "NaN in the model": (
        lambda place: _damaged(place, "model/model.safetensors", _nan), TRACE, "NaN or inf); the file is damaged"
    ),
    "model file cut short": (lambda place: _cut(place / "model/model.safetensors"), TRACE, "cannot be loaded"),
    "no dictionaries": (NOTHING, TRACE[:4], "comes with no dictionaries; pass a folder"),
    "unknown dictionaries": (NOTHING, [*TRACE[:4], "--dictionaries", "/nowhere"], "no such folder; pass a folder"),
    "a folder without dictionaries": (NOTHING, [*TRACE[:4], "--dictionaries", "model"], "no known format"),
    "dictionaries of another width": (
        lambda place: _damaged(place, _first_dictionary(place), _narrow), TRACE, "layer 0: reads vectors of width 20"
    ),
    "NaN in a dictionary": (
        lambda place: _damaged(place, _first_dictionary(place), _nan), TRACE, "not finite (NaN or inf)"
    ),
    "dictionary cut short": (lambda place: _cut(place / _first_dictionary(place)), TRACE, "it may be cut short"),
    "node threshold in percent": (NOTHING, [*TRACE, "--node-threshold", "80"], "for 80 percent pass 0.8"),
    "negative threshold": (NOTHING, [*TRACE, "--edge-threshold", "-0.1"], "must be in [0, 1]"),
    "threshold that is no number": (NOTHING, [*TRACE, "--edge-threshold", "nan"], "must be in [0, 1]"),
    "threshold that is no float": (NOTHING, [*TRACE, "--node-threshold", "high"], "invalid float value: 'high'"),
    "unknown dtype": (NOTHING, [*TRACE, "--dtype", "int8"], "needs one of float32, float64"),
    "unknown device": (NOTHING, [*TRACE, "--device", "banana"], "is not available here"),
    "unknown engine": (NOTHING, [*TRACE, "--engine", "warp"], "needs one of linear, autograd"),
    "unknown format": (NOTHING, [*TRACE, "--format", "docx"], "no such format; have svg, png, json"),
    "no format": (NOTHING, [*TRACE, "--format", ","], "names no format"),
    "unknown target": (NOTHING, [*TRACE, "--target", "w144"], "not in the vocabulary"),
    "target of two tokens": (NOTHING, [*TRACE, "--target", "w4 w5"], "is several tokens (w4 | w5)"),
    "feature that does not exist": (NOTHING, [*TRACE, "--target", "L9#1@2"], "no such feature"),
    "position past the prompt": (NOTHING, [*TRACE, "--position", "99"], "the prompt has positions 0 to 7"),
    "negative max-features": (NOTHING, [*TRACE, "--max-features", "-1"], "must be 0 or more"),
    "output is a file": (NOTHING, [*TRACE, "-o", "model/config.json"], "is a file, needs a folder"),
    "output below a file": (NOTHING, [*TRACE, "-o", "model/config.json/x"], "is a file, needs a folder"),
    "output that can't be made": (NOTHING, [*TRACE, "-o", "/proc/nowhere"], "can't write there"),
    "a folder where the file should be": (
        lambda place: (place / "out/graph.json").mkdir(parents=True), [*TRACE, *OUT], "is a folder, needs a file"
    ),
    "svg without Graphviz": (_no_graphviz, [*TRACE, "--format", "svg"], "Graphviz is not installed (no `dot`"),
    "no prompt": (NOTHING, ["trace"], "one of the arguments PROMPT --prompts is required; see circuits trace --help"),
    "unknown option": (NOTHING, [*TRACE, "--colour"], "unrecognized arguments: --colour; see circuits trace --help"),
    "unknown command": (NOTHING, ["draw"], "invalid choice: 'draw'"),
    "no such graph": (NOTHING, ["show", "nowhere.safetensors"], "no such file"),
    "a folder for a graph": (NOTHING, ["show", "model"], "not a file"),
    "JSON that is no graph": (NOTHING, ["show", "model/config.json"], "pass a graph in the Neuronpedia format"),
    "safetensors that is no graph": (NOTHING, ["prune", "model/model.safetensors"], "without a graph header"),
    "hostile JSON": (
        lambda place: (place / "deep.json").write_text("[" * 200_000), ["show", "deep.json"], "not JSON"
    ),
    "hostile safetensors": (
        lambda place: (place / "g.safetensors").write_bytes(b"\xff" * 8 + b"{}"), ["show", "g.safetensors"], "a whole"
    ),
    "export without a format": (NOTHING, ["export", "g.json"], "the following arguments are required: --format"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_exit_code_2_and_nothing_written(
    mistake: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prepare, command, line = MISTAKES[mistake]
    if prepare is not None:
        prepare(monkeypatch if prepare is _no_graphviz else place)
    before = _files(place)
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("circuits: error: ")
    assert said.err.count("\n") == 1, said.err
    assert line in said.err
    assert _files(place) == before


STORED_MISTAKES = {
    "pruned to a threshold in percent": (["prune", "out/graph.safetensors", "--node-threshold", "80"], "pass 0.8"),
    "shown with a threshold in percent": (["show", "out/graph.safetensors", "--edge-threshold", "98"], "pass 0.98"),
    "pruned to an unknown suffix": (["prune", "out/graph.json", "-o", "x.docx"], "the suffix '.docx' names no format"),
    "pruned to a folder": (["prune", "out/graph.json", "-o", "made.json"], "is a folder, needs a file"),
    "exported over itself": (["export", "out/graph.json", "--format", "json"], "would replace 'graph.json' itself"),
    "exported into a file": (["export", "out/graph.json", "--format", "dot", "-o", "out/graph.dot"], "is a file"),
}


@pytest.mark.parametrize("mistake", STORED_MISTAKES)
def test_a_mistake_with_a_stored_graph_leaves_it_as_it_was(
    mistake: str, traced: Path, capsys: pytest.CaptureFixture[str]
):
    command, line = STORED_MISTAKES[mistake]
    (traced.parent / "made.json").mkdir()
    before = {path: path.read_bytes() for path in traced.iterdir()}
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert line in said.err
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in traced.iterdir()} == before


def test_a_failure_while_writing_leaves_no_file_behind(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Files appear together: a full disk at the last of them takes the first ones back too, and the new folder."""

    def full(graph: AttributionGraph, path: Path) -> None:
        raise OSError(28, "No space left on device")

    from circuits import outputs

    row = outputs.FORMATS["native"]._replace(write=full)
    monkeypatch.setattr(outputs, "FORMATS", {**outputs.FORMATS, "native": row})
    before = _files(place)
    assert cli.main([*TRACE, "--format", "json,native", "-o", "a/b"]) == 2
    assert "can't write there (No space left on device)" in capsys.readouterr().err
    assert _files(place) == before


def test_interrupting_leaves_nothing_behind(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("circuits.attribute", interrupted)
    before = _files(place)
    assert cli.main(TRACE) == 130
    assert capsys.readouterr().err == "circuits: interrupted; nothing was written\n"
    assert _files(place) == before


def test_control_characters_in_a_message_are_not_sent_to_the_terminal(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["show", "a\x1b[2Jb\n.json"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_every_command_takes_json():
    top = cli.parser()
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices
    assert all("--json" in command.format_help() for command in commands.values())


@pytest.mark.parametrize("attention", ["frozen", "gradient"])
def test_heads_split_a_stored_graph(place: Path, capsys: pytest.CaptureFixture[str], attention: str):
    assert cli.main([*TRACE, "-o", "out", "--format", "native", "--attention", attention]) == 0
    capsys.readouterr()
    command = ["heads", "out/graph.safetensors", "--dictionaries", "dicts", "-o", "heads.safetensors"]
    assert cli.main([*command, "--json", "--edges", "3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["edges"]) == 3 and Path(answer["file"]).is_file()
    for edge in answer["edges"]:
        assert edge["heads"][0]["head"] is None or edge["heads"][0]["head"].startswith("L")
    assert cli.main([*command, "--edges", "2"]) == 0
    assert "the parts add up to the weight" in capsys.readouterr().out
    assert cli.main([*command, "--edges", "0"]) == 2
