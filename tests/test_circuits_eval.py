"""`circuits eval`: its figures are the library's, its table, JSON and pictures hold them, and every mistake is one
line."""

from __future__ import annotations

import inspect
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from circuits import attribute, cli
from circuits.commands.eval import SHOWN
from circuits.defaults import default
from circuits.display_eval import tables
from circuits.labels import read_labels
from circuits.measures import MEASURES
from circuits.plots import front
from circuits.quality import Documents, measure
from circuits.scores import graph_scores
from graphs import completeness_score, replacement_score
from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.evaluation.splicing import Splice
from replacement.evaluation.suite import evaluate
from replacement.evaluation.words import evaluate_absorption, vocabulary_words
from replacement.formats.native import save
from replacement.loading import load_bridge
from replacement.training.data import open_tokens
from tests.test_replacement_evaluation_splicing import perfect_sae
from tests.tiny import CONTEXT, PROMPT, random_set


class Sizes:
    """What `random_set` asks of a model's configuration."""

    n_layers, d_model = 3, 24


@pytest.fixture
def place(tmp_path: Path, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a tiny model, two sets of dictionaries and a text in it."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    for name, kind in (("dicts", "transcoder"), ("others", "cross_layer_transcoder")):
        made = random_set("llama", kind, "topk", Sizes)
        save(DictionarySet(made.by_layer, name), tmp_path / name)
    words = torch.randint(3, 60, (1500, 12), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(f"w{number}" for number in row) for row in words.tolist()]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


EVAL = ["eval", "--model", "model", "--data", "text.jsonl", "--context", "8", "--tokens", "80"]


def test_json_holds_the_librarys_figures(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*EVAL, "--dictionaries", "dicts", "--measure", "replacement,sites", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bridge, _ = load_bridge("model", torch.float32, "cpu")
    source = open_tokens("text.jsonl", model=bridge, context=8, split="held_out")
    documents = Documents(source, tokens=80, vocabulary=60)
    expected = evaluate(Splice(bridge, formats.load("dicts")), documents)
    (one,) = found["sets"]
    for name in ("kl", "top1", "ce_recovered", "tokens"):
        assert one["evaluation"]["replacement"][name] == getattr(expected.replacement, name)
    for site, stored in zip(expected.sites, one["evaluation"]["sites"], strict=True):
        assert stored["reconstruction"]["fvu"] == site.reconstruction.fvu
    assert one["evaluation"]["sites"][2]["downstream"] is None
    assert one["tokens"] == documents.tokens and one["graphs"] is None and found["files"] == []


def test_every_measure_has_its_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "labels.json").write_text(json.dumps({"low": {"yes": [f"w{i}" for i in range(3, 30)]}}))
    (place / "prompts.txt").write_text(f"{PROMPT}\n\nw3 w4 w5\n")
    given = ["--dictionaries", "dicts", "--against", "dicts", "--labels", "labels.json", "--prompts", "prompts.txt"]
    assert cli.main([*EVAL, *given, "--tokens", "400"]) == 0
    out = capsys.readouterr().out
    for title in (
        "Reconstruction", "All sites replaced", "Each site alone", "Beside what needs no dictionary", "Probing",
        "Stability", "Graphs of 2 prompts",
    ):  # fmt: skip
        assert title in out
    assert "absorption: needs a tokenizer with a BOS token and words" in out
    assert "Stability against dicts" in out and "1.000    1.000   100.0" in out, "a set is stable against itself"
    assert max(len(line) for line in out.splitlines()) <= 100


def test_several_sets_stand_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    both = ["--dictionaries", "dicts", "--dictionaries", "others"]
    assert cli.main([*EVAL, *both, "--measure", "reconstruction", "--plots", "plots"]) == 0
    out = capsys.readouterr().out
    assert "Sets side by side" in out and "others" in out
    assert {path.name for path in (place / "plots").iterdir()} == {
        "pareto.png", "pareto.svg", "densities.png", "densities.svg",
    }  # fmt: skip
    assert (place / "plots/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (place / "plots/densities.svg").read_text()


def test_figures_are_printed_where_their_pictures_fail(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk filled up while the model ran: the figures took long, and stay."""
    pytest.importorskip("matplotlib")

    def full(figure: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("circuits.plots._write", full)
    short = [*EVAL, "--dictionaries", "dicts", "--measure", "reconstruction", "--plots", "a/plots"]
    assert cli.main(short) == 2
    captured = capsys.readouterr()
    assert "Reconstruction" in captured.out
    assert "'a/plots': can't write there (No space left" in captured.err and captured.err.count("\n") == 1
    assert cli.main([*short, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["files"] == []


def test_trying_the_place_of_pictures_leaves_nothing(place: Path) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main([*EVAL, "--dictionaries", "nowhere", "--plots", "a/plots"]) == 2
    assert not (place / "a").exists()


@pytest.mark.parametrize("sets", [["dicts"], ["dicts", "a/rather/long/path/of/a/folder/with/dictionaries"]])
def test_no_figure_is_broken_at_80_columns(place: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str]) -> None:
    """Names and notes may take another line, never a figure or a head."""
    for name in sets[1:]:
        shutil.copytree("dicts", name)
    words = {"yes": [f"w{i}" for i in range(3, 30)]}
    (place / "labels.json").write_text(json.dumps({"a property whose name is rather long": words}))
    kept: list[Any] = []
    monkeypatch.setattr("circuits.display_eval.show_qualities", lambda found, **settings: kept.extend(found))
    named = [part for name in sets for part in ("--dictionaries", name)]
    asked = ["--labels", "labels.json", "--measure", ",".join(MEASURES), "--against", "dicts", "--tokens", "400"]
    assert cli.main([*EVAL, *named, *asked]) == 0
    narrow, wide = (_tables(kept, columns) for columns in (80, 200))
    assert "…" not in narrow and max(map(len, narrow.splitlines())) <= 80
    figures = [[word for word in text.split() if word[0].isdigit() or word == "%"] for text in (narrow, wide)]
    assert figures[0] == figures[1] and len(figures[0]) > 20


def _tables(qualities: Any, columns: int) -> str:
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(tables(qualities, model="model", data="text.jsonl", against="dicts"))
    return captured.get()


def test_sets_of_one_name_are_told_apart(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both call themselves "dicts"; and of several sets each has its stability."""
    made = random_set("llama", "transcoder", "topk", Sizes, n_features=20)
    save(DictionarySet(made.by_layer, "dicts"), place / "seeds/1")
    both = ["--dictionaries", "dicts", "--dictionaries", "seeds/1", "--against", "dicts", "--measure", "reconstruction"]
    assert cli.main([*EVAL, *both]) == 0
    out = capsys.readouterr().out
    stable = out[out.index("Stability against dicts") :].splitlines()
    assert stable[3].split() == ["dicts", "3", "1.000", "1.000", "100.0"]
    assert stable[4].split()[:2] == ["seeds/1", "3"]
    assert cli.main([*EVAL, *both, "--context", "999", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["given"], one["path"]) for one in found["sets"]] == [
        ("dicts", "dicts", "dicts"), ("dicts", "seeds/1", "seeds/1"),
    ]  # fmt: skip
    used = {"context": CONTEXT, "measure": ["reconstruction"], "against": "dicts", "dtype": "float32"}
    assert found["settings"] | used | {"prompts": None, "labels": None} == found["settings"]


def test_layers_without_stability_leave_the_others(place: Path) -> None:
    found: list[Any] = []
    bridge, _ = load_bridge("model", torch.float32, "cpu")
    source = open_tokens("text.jsonl", model=bridge, context=8, split="held_out")
    documents = Documents(source, tokens=80, vocabulary=60)
    for against in (formats.load("dicts"), None):
        found.append(measure(bridge, formats.load("dicts"), documents, model="m", measures=(), against=against))
    found.append(found[0]._replace(name="one layer", stability=found[0].stability[:1]))
    shown = _tables(found, 80)
    rows = shown[shown.index("Stability") :].splitlines()[3:6]
    assert [row.split()[-4:] for row in rows] == [
        ["3", "1.000", "1.000", "100.0"], ["0", "-", "-", "-"], ["1", "1.000", "1.000", "100.0"],
    ]  # fmt: skip


def test_a_residual_sae_is_measured_and_traced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that misses nothing leaves no errors in a graph."""
    save(DictionarySet({1: perfect_sae(1, "hook_resid_post", 24).float()}, "sae"), place / "sae")
    assert cli.main([*EVAL, "--dictionaries", "sae", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["sets"]
    assert one["graphs"]["replacement"] == pytest.approx(1.0)
    assert one["evaluation"]["replacement"]["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert [row["site"] for row in one["baselines"]] == ["blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dictionaries", "nowhere"], "'nowhere': no such folder"),
        (["--measure", "speed"], f"no such measure; have {', '.join(MEASURES)}"),
        (["--tokens", "1"], "--tokens 1: needs at least 2"),
        (["--prompts", "none.txt"], "can't be read"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--labels", "empty.txt"], "not readable JSON"),
        (["--labels", "list.json"], 'needs {"task"'),
        (["--labels", "unknown.json"], "none of the 'yes' words of 'a' is one token"),
        (["--dtype", "int8"], "needs one of float32"),
        (["--data", "none.txt"], "none.txt"),
        (["--plots", "empty.txt"], "can't write there"),
        (["--plots", "/proc/nope", "--dictionaries", "nowhere"], "--plots '/proc/nope': can't write there"),
        (["--plots", "/dev/null/nope", "--dictionaries", "nowhere"], "--plots '/dev/null/nope': can't write there"),
    ],
)
def test_a_mistake_is_one_line(place: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str) -> None:
    if "--plots" in given:
        pytest.importorskip("matplotlib")
    (place / "empty.txt").write_text("")
    (place / "list.json").write_text("[1]")
    (place / "unknown.json").write_text('{"a": {"yes": ["nonsense"]}}')
    measure = [] if "--measure" in given else ["--measure", "reconstruction"]
    assert cli.main([*EVAL, "--dictionaries", "dicts", *measure, *given]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1


def test_the_command_knows_every_measure() -> None:
    """The command names them without importing torch."""
    assert set(SHOWN) <= set(MEASURES)


def test_the_text_field_is_the_librarys() -> None:
    """Its default stands in a package's own file."""
    found = vars(cli.parser().parse_args(["eval"]))["text_field"]
    assert found == inspect.signature(open_tokens).parameters["text_field"].default
    assert found == default("replacement.training.data:open_tokens", "text_field")


def test_without_matplotlib_plots_are_one_clear_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the long work, not after."""
    monkeypatch.setattr("circuits.plots.find_spec", lambda name: None)
    assert cli.main([*EVAL, "--dictionaries", "nowhere", "--plots", "plots"]) == 2
    assert "pip install 'circuits[plots]'" in capsys.readouterr().err


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(3.0, 0.1), (1.0, 0.5), (2.0, 0.6), (2.0, 0.2), (4.0, 0.1), (1.0, 0.5)]
    kept = {points[i] for i in front(points)}
    for x, y in points:
        beaten = any((a <= x and b <= y) and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in kept) != beaten
    assert front([]) == []


def test_scores_over_prompts_are_the_mean_of_each_graphs(tiny_model) -> None:
    model = tiny_model("llama", "transcoder")
    prompts = [PROMPT, "w4 w9", torch.tensor([1, 5, 6])]
    found = graph_scores(model, prompts)
    each = [attribute(model, prompt) for prompt in prompts]
    assert [one.replacement for one in found.prompts] == [pytest.approx(replacement_score(graph)) for graph in each]
    assert found.completeness == pytest.approx(sum(completeness_score(graph) for graph in each) / 3)
    values = torch.tensor([one.replacement for one in found.prompts], dtype=torch.float64)
    assert found.replacement_error == pytest.approx((values.std() / 3**0.5).item())
    with pytest.raises(InputError, match="got no prompts"):
        graph_scores(model, [])


def test_labels_without_no_take_every_other_token(place: Path) -> None:
    bridge, _ = load_bridge("model", torch.float32, "cpu")
    (place / "labels.json").write_text('{"a": {"yes": ["w3"]}, "b": {"yes": ["w3", "unknown"], "no": ["w4"]}}')
    found, tokens = read_labels(place / "labels.json", bridge.tokenizer), torch.tensor([[1, 3, 4, 5]])
    assert found["a"](tokens).tolist() == [[-1, 1, 0, 0]]
    assert found["b"](tokens).tolist() == [[-1, 1, 0, -1]]


def test_documents_are_the_same_each_time_and_bounded() -> None:
    class Source:
        context, n_documents = 4, 7

        def batch(self, index: int, documents: int) -> torch.Tensor:
            return torch.arange(index * documents, (index + 1) * documents)[:, None].expand(documents, 4) % 7

    documents = Documents(Source(), tokens=1000, vocabulary=10, memory=6 * 8 * 4 * 10 * 3)
    assert documents.tokens == 28 and documents.batch == 3
    first, again = (torch.cat(list(documents))[:, 0].tolist() for _ in range(2))
    assert first == again == list(range(7))
    assert len(documents.beginnings(5)) == 5
    Source.n_documents = 1
    with pytest.raises(InputError, match="got 1 documents of 4 tokens, needs 2 or more"):
        Documents(Source(), tokens=1000, vocabulary=10)


def test_absorption_is_measured_on_words_run_alone(tiny_model) -> None:
    """Only tokens of letters alone count; a vocabulary without any is refused."""
    bridge = tiny_model("llama", "neurons").bridge
    assert vocabulary_words(bridge.tokenizer) == {}, "w3 is no word of letters"
    with pytest.raises(InputError, match="words of the letters a to z"):
        evaluate_absorption(Splice(bridge, tiny_model("llama", "neurons").dictionaries))
