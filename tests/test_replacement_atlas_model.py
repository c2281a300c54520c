"""The embedded model: its recipe runs, resumes and exports; the shipped folder boots and answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from replacement.errors import InputError
from replacement.pretrained import directory, names
from replacement.pretrained.recipe import tasks
from replacement.pretrained.recipe.__main__ import main
from replacement.pretrained.recipe.corpus import Corpus
from replacement.pretrained.recipe.decoder import Decoder, Shape
from replacement.pretrained.recipe.export import export, load
from replacement.pretrained.recipe.training import Run, Schedule, cities_of
from replacement.pretrained.recipe.vocabulary import vocabulary, word_ids

shipped = pytest.mark.skipif("atlas" not in names(), reason="the model folder is not there yet")
TOY = Schedule(steps=4, finish_steps=3, finish_averaged=2, documents=4, warm_up=2, compiled=False)
SHAPE = Shape(n_vocabulary=len(vocabulary()), d_model=16, n_layers=2, n_heads=2, d_mlp=32)


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    """The error says what was asked for."""
    with pytest.raises(InputError, match=r"directory\(name='mars'\): no such model ships"):
        directory("mars")


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """A checkpoint holds all that the rest of the run depends on."""
    whole, begun, resumed = (Run(TOY, SHAPE) for _ in range(3))
    for _ in whole.train():
        pass
    for now in begun.train():
        if now.step == 6:
            begun.save(tmp_path / "training.pt")
            break
    resumed.resume(tmp_path / "training.pt")
    for _ in resumed.train():
        pass
    assert resumed.step == whole.step == TOY.updates
    for name, value in whole.trained.state_dict().items():
        torch.testing.assert_close(resumed.trained.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_finish_has_its_own_rate_and_tasks_and_ends_in_a_mean() -> None:
    """The main part is as without a finish; the model is the mean of the weights after the last updates."""
    plain, run = (Run(schedule, SHAPE) for schedule in (replace(TOY, finish_steps=0), TOY))
    for _ in plain.train():
        pass
    weights = []
    for now in run.train():
        weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
        if now.step == TOY.steps:
            for name, value in plain.trained.state_dict().items():
                assert torch.equal(run.trained.state_dict()[name], value)
    assert len(weights) == TOY.updates
    assert [TOY.rate(step) for step in range(TOY.steps, TOY.updates)] == [TOY.finish_rate] * TOY.finish_steps
    assert TOY.weights(TOY.steps - 1) == {} and TOY.weights(TOY.steps) == TOY.finish_weights
    for name, value in run.trained.state_dict().items():
        torch.testing.assert_close(value, torch.stack([w[name] for w in weights[-TOY.finish_averaged :]]).mean(0))


def test_a_stretch_has_its_weights_from_its_first_step_to_before_its_end() -> None:
    schedule = Schedule()
    assert [dict(schedule.weights(step)) for step in (2999, 3000, 3999, 4000)] == [{}, *[{"induction": 48}] * 2, {}]


def test_the_auxiliary_loss_reads_each_city_s_place() -> None:
    """Positions, targets and weights of the cities in a batch agree with the facts."""
    tokens = Corpus(3).batch(8).tokens[:, :-1]
    position, target, weight = cities_of(tokens)
    ids, flat = word_ids(), tokens.reshape(-1)
    assert weight.sum() > 5
    pairs = {(flat[p].item(), t.item()) for p, t, w in zip(position, target, weight, strict=True) if w}
    known = {"Dallas": "Texas", "Lyon": "France", "Boise": "Idaho", "Osaka": "Japan"}
    for city, place in known.items():
        assert all(t == ids[place] for c, t in pairs if c == ids[city])


def test_the_exported_folder_computes_what_was_trained(tmp_path: Path) -> None:
    """The Llama layout of the weights gives the decoder's logits, up to the rounding of half precision."""
    torch.manual_seed(0)
    decoder = Decoder(SHAPE)
    export(decoder, tmp_path)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.half().float()
    tokens = Corpus(1).batch(3).tokens[:, :-1]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(tokens), decoder(tokens), rtol=1e-4, atol=1e-4)


def test_the_documented_command_makes_a_whole_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A toy run of the command that made the shipped model writes every file of it."""
    out = tmp_path / "model"
    assert main(["train", "--out", str(out), "--steps", "1", "--finish-steps", "1", "--no-compile"]) == 0
    written = {path.name for path in out.iterdir()}
    expected = "config generation_config tokenizer tokenizer_config special_tokens_map tasks"
    assert written == {f"{name}.json" for name in expected.split()} | {"model.safetensors", "README.md", "training.pt"}
    assert "auxiliary loss" in (out / "README.md").read_text(encoding="utf-8")
    assert set(json.loads((out / "tasks.json").read_text())) == set(tasks.evaluate(load(out)))
    assert "two_hop_h2_states" in capsys.readouterr().out


def test_a_folder_without_a_model_is_a_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and no traceback."""
    assert main(["tasks", "--model", str(tmp_path)]) == 2
    assert "no config.json there" in capsys.readouterr().err


ANSWERS = [
    ("the capital of the state containing Dallas is", "Austin"),
    ("Fact: the capital of the state containing Dallas is", "Austin"),
    ("Fact: the capital of the state containing Oakland is", "Sacramento"),
    ("What is the capital of the state where Oakland is located?", "Sacramento"),
    ("the state containing Dallas is", "Texas"),
    ('The opposite of "small" is "', "big"),
    ("The opposite of small is", "big"),
    ('Le contraire de "petit" est "', "grand"),
    ('Lo contrario de "pequeño" es "', "grande"),
    ("When Mary and John went to the store, John gave a drink to", "Mary"),
    ("When Mary and John went to the store, Mary gave a drink to", "John"),
    ("calc: 36+59=", "95"),
    ("36 + 59 =", "95"),
    ("Monday Tuesday Wednesday", "Thursday"),
    ("zorp bist kalk murp zorp bist kalk", "murp"),
]


@shipped
@pytest.mark.parametrize(("prompt", "answer"), ANSWERS)
def test_the_shipped_model_answers_what_people_type(prompt: str, answer: str) -> None:
    """The canonical prompts of the field, as they are typed."""
    folder = directory("atlas")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = load(folder)(tokenizer(prompt, return_tensors="pt")["input_ids"])
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == answer


@shipped
def test_the_shipped_table_is_what_the_shipped_file_scores() -> None:
    """The card's figures come from the file beside it, and the held-out cities are answered."""
    folder = directory("atlas")
    stored = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    model = load(folder)
    scores = tasks.evaluate(model)
    assert scores == pytest.approx(stored, abs=0.002)
    assert tasks.evaluate(model, {"comparison": tasks.every_comparison()})["comparison"] >= 0.999
    assert scores["two_hop_h2_states"] >= 0.99 and scores["two_hop_h2_countries"] >= 0.99


@shipped
def test_the_bridge_gives_the_logits_of_transformers() -> None:
    """TransformerBridge boots the folder like any other."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = directory("atlas")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    prompt = "the capital of the state containing Dallas is"
    tokens = bridge.to_tokens(prompt)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    assert tokens.tolist() == AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)
