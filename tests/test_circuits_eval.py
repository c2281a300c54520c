"""`circuits eval`: its figures are the library's, its table, JSON and pictures hold them, and every mistake is one
line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from circuits import attribute, cli
from circuits.commands.eval import SHOWN
from circuits.labels import read_labels
from circuits.measures import MEASURES
from circuits.plots import front
from circuits.quality import Documents
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
from tests.tiny import PROMPT, random_set


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
    assert "1.000    1.000  100.0 %" in out, "a set is stable against itself"
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
