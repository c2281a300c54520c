"""`circuits diff-models`: a pair of tiny models compared in one command, and mistakes in one line."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from circuits.cli import main
from circuits.model_diff import Measures, layer_differences
from replacement import formats
from replacement.evaluation.divergence import Divergence
from replacement.evaluation.model_diff import Kind, ModelDiff, Scaling
from replacement.loading import load_bridge
from replacement.starts import start_token
from tests.tiny import save_tiny_model

SMALL = ["--features", "32", "--k", "4", "--tokens", "2560", "--held-out", "300", "--context", "16", "--top", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, the same with other weights in its last block, and a text."""
    folder = tmp_path_factory.mktemp("diff")
    save_tiny_model("llama", folder / "base")
    shutil.copytree(folder / "base", folder / "tuned")
    path = folder / "tuned" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.5 * torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, path, metadata={"format": "pt"})
    draw = random.Random(0)
    documents = (" ".join(f"w{draw.randint(3, 40)}" for _ in range(60)) for _ in range(120))
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def command(place: Path, out: Path, *more: str) -> list[str]:
    line = ["diff-models", str(place / "base"), str(place / "tuned"), "--data", str(place / "text.txt")]
    return [*line, *SMALL, "-o", str(out), *more]


def test_a_pair_is_compared_in_one_command(place: Path, tmp_path: Path, capsys) -> None:
    """The layer is found where the models differ; the stored crosscoder gives the same report again."""
    out = tmp_path / "out"
    assert main(command(place, out, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["site"] == "blocks.2.hook_resid_post" and [one["largest"] for one in found["layers"][:2]] == [0, 0]
    assert sum(found["counts"].values()) == 32 and found["tokens"] >= 300
    (crosscoder,) = formats.load(out / "crosscoder")
    assert crosscoder.kind == "crosscoder" and crosscoder.activation.name == "batchtopk"  # type: ignore[attr-defined]
    stored = json.loads((out / "diff.json").read_text())
    assert all(stored[name] == found[name] for name in stored)
    shares, parts = [one["own_share"] for one in found["differing"]], found["divergence"]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True) and shares[0] > 0
    for one in found["differing"]:
        nu = max(0, min(1, max(one["nu_reconstruction"], one["nu_error"])))
        assert one["fires_on"] and one["own_share"] == pytest.approx(one["share"] * (1 - nu))
    assert all(one["kind"] == "tuned only" for one in found["tuned_only"])
    assert sum(parts[name] for name in ("features", "bias", "error", "residual")) == pytest.approx(parts["total"])
    assert abs(parts["residual"]) < 0.05 * parts["total"]
    again = command(place, tmp_path / "again", "--crosscoder", str(out / "crosscoder"), "--json")
    assert main(again) == 0
    second = json.loads(capsys.readouterr().out)
    assert all(second[name] == found[name] for name in ("counts", "differing", "tuned_only", "site", "l0"))
    assert main(again[:-1]) == 0
    said = capsys.readouterr().out
    assert "What makes their predictions differ" in said and "Only the tuned model writes this" in said
    assert "shared" in said and str(tmp_path / "again") in said
    documents = (place / "text.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"body": one}) + "\n" for one in documents), encoding="utf-8"
    )
    assert main([*again, "--data", str(tmp_path / "text.jsonl"), "--text-field", "body"]) == 0
    third = json.loads(capsys.readouterr().out)
    assert all(third[name] == second[name] for name in ("counts", "differing", "tokens", "l0"))
    assert main([*again, "--data", str(tmp_path / "text.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "has no field 'text'; its fields: body" in said and said.count("\n") == 1


def test_how_far_apart_streams_are_is_measured_on_text(place: Path) -> None:
    """Median and 99th percentile of `|x' - x| / |x|` over all tokens but start tokens, wherever they stand."""
    bridges = {name: load_bridge(place / name, torch.float32, "cpu")[0] for name in ("base", "tuned")}
    rows = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = rows[1, 5] = rows[2, 7] = start_token(bridges["base"].tokenizer)
    found = layer_differences(bridges, rows)[2]
    x, y = (one.run_with_cache(rows)[1]["blocks.2.hook_resid_post"] for one in bridges.values())
    shares = ((y - x).norm(dim=-1) / x.norm(dim=-1))[rows != rows[0, 0]]
    assert len(shares) == 4 * 11 - 2
    assert (found.typical, found.largest) == pytest.approx((shares.median().item(), shares.quantile(0.99).item()))


def test_what_both_models_have_comes_after_what_one_has() -> None:
    """Parts are discounted by the larger nu of the model whose the feature is; a dead feature is in no list."""
    nan = float("nan")
    scaling = ModelDiff(
        relative_norm=torch.tensor([0.5, 0.5, 0.95, 0.05, 0.5]),
        cosine=torch.tensor([0.9, 0.3, 0.2, 0.2, 0.1]),
        of_tuned=Scaling(torch.tensor([0.9, 0.2, -3.0, 9.0, nan]), torch.tensor([0.4, 0.5, 0.0, 9.0, nan])),
        of_base=Scaling(torch.tensor([0.9, 0.2, 9.0, 0.25, nan]), torch.tensor([0.9, 0.5, 9.0, 0.1, nan])),
        rate=torch.tensor([0.1, 0.1, 0.1, 0.1, 0.0]),
        peak=torch.ones(5),
        tokens=10,
    )
    measured = Measures(scaling, Divergence(1.0, torch.tensor([0.4, 0.2, 0.05, 0.08, 0.0]), 0.0, 0.0, 0.0, 10))
    torch.testing.assert_close(measured.own, torch.tensor([0.04, 0.1, 0.05, 0.06, 0.0]))
    assert measured.order() == [1, 3, 2, 0] and measured.order(Kind.BASE_ONLY) == [3]
    assert measured.confirmed == {**dict.fromkeys(map(str, Kind), 0), "tuned only": 1, "base only": 1}


def test_models_that_cannot_be_compared_are_refused(place: Path, tmp_path: Path, capsys) -> None:
    save_tiny_model("gpt2", tmp_path / "other")
    shutil.copytree(place / "base", tmp_path / "renamed")
    path = tmp_path / "renamed" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"w7"', '"v7"'), encoding="utf-8")
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(place / "base").save_pretrained(tmp_path / "narrow")
    (tmp_path / "no").mkdir()
    cases = {
        "have width 24 and 16, need the same": [str(place / "base"), str(tmp_path / "narrow")],
        "tokenizers give one text different tokens": [str(place / "base"), str(tmp_path / "renamed")],
        "no such directory": [str(place / "base"), str(tmp_path / "nowhere")],
        "the model has layers 0 to 2": [str(place / "base"), str(place / "tuned"), "--layer", "7"],
        "does not have it": [str(place / "base"), str(place / "tuned"), "--site", "hook_nothing"],
        "no known format": [str(place / "base"), str(place / "tuned"), "--crosscoder", str(tmp_path / "no")],
        "atlas only": [str(place / "base"), str(place / "tuned"), "--data", "atlas-changed"],
        "each must be at least 1": [str(place / "base"), str(place / "tuned"), "--held-out", "0"],
    }
    capsys.readouterr()  # what saving models said
    for words, given in cases.items():
        data = [] if "--data" in given else ["--data", str(place / "text.txt")]
        assert main(["diff-models", *given, *data, *SMALL[:6], "--context", "16", "-o", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not (tmp_path / "out" / "diff.json").exists()
