"""`circuits train`: every kind in one command, killed and gone on bit for bit, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from circuits.cli import main
from circuits.settings import fields
from graphs import AttributionGraph
from replacement import formats
from replacement.loading import load_bridge
from replacement.training import TrainingConfig, plans
from replacement.training.bridge import ReplaceableBridge
from replacement.training.config import KINDS
from replacement.training.kinds import sites
from tests.tiny import PROMPT, save_tiny_model

SMALL = ["--features", "32", "--k", "4", "--batch-tokens", "128", "--buffer-bytes", "200000", "--context", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("train")
    save_tiny_model("llama", folder / "model")
    draw = random.Random(0)
    documents = (" ".join(f"w{draw.randint(3, 40)}" for _ in range(60)) for _ in range(120))
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return folder


def command(place: Path, out: Path, *more: str) -> list[str]:
    start = ["train", "--model", str(place / "model"), "--data", str(place / "text.txt"), "-o", str(out)]
    return [*start, *SMALL, *more]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_by_one_command(kind: str, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The folder loads, holds a log with falling FVU, and is traced at once where it writes MLP outputs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    assert main(command(place, out, "--kind", kind, "--tokens", "12800", "--end-to-end", "3")) == 0
    found = formats.load(out)
    assert {one.kind for one in found} == {{"clt": "cross_layer_transcoder"}.get(kind, kind)}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    stage = [record["fvu"] for record in records if record["stage"] == "reconstruction"]
    assert stage[-1] < stage[0] and records[-1]["stage"] == "end to end" and records[-1]["kl"] >= 0
    capsys.readouterr()
    if kind in ("transcoder", "skip_transcoder", "clt"):
        traced = ["trace", PROMPT, "--model", str(place / "model"), "--dictionaries", str(out)]
        assert main([*traced, "-o", str(tmp_path / "graph"), "--format", "json"]) == 0
        assert main(command(place, out, "--kind", kind, "--tokens", "12800", "--end-to-end", "3")) == 0  # done already


@pytest.mark.parametrize("kind", ["skip_transcoder", "clt"])
@pytest.mark.parametrize("encoder", ["switch", "kronecker"])
def test_other_encoders_are_trained_and_traced_like_the_linear_one(
    kind: str, encoder: str, place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The run ends in a folder that says which encoder it holds; traced, its rows add up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    more = ("--kind", kind, "--encoder", encoder, "--experts", "4", "--pairs", "2,2", "--tokens", "12800")
    assert main(command(place, out, *more, "--end-to-end", "3")) == 0
    assert {one.encoding.name for one in formats.load(out)} == {encoder}
    traced = ["trace", PROMPT, "--model", str(place / "model"), "--dictionaries", str(out)]
    assert main([*traced, "-o", str(tmp_path / "graph"), "--format", "native"]) == 0
    (path,) = (tmp_path / "graph").rglob("*.safetensors")
    graph = AttributionGraph.load(path)
    assert graph.nodes.is_feature.any() and graph.residual < 1e-5
    assert main(command(place, tmp_path / "other", *more, "--sparsity", "relu")) == 2
    assert "takes sparsity batchtopk or topk" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_run_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle, then the same command again: the same bytes as a run that nobody killed."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    more = ("--kind", "skip_transcoder", "--tokens", "128000", "--json")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(out: Path) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "circuits", *command(place, out, *more)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)

    assert start(whole).wait() == 0
    process, checkpoint = start(killed), killed / "checkpoints" / "reconstruction.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run ended before it could be killed"
    assert start(killed).wait() == 0
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--kind", "sea"], "needs one of transcoder"),
        (["--features", "33"], "multiple of 8"),
        (["--tokens", "5"], "less than one batch of 128 tokens"),
        (["--layers", "0,7"], "the model has layers 0 to 2"),
        (["--kind", "sae", "--site", "hook_resid_pots"], "hook_resid_post"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--log", "nothing"], "needs one of tensorboard"),
    ],
)
def test_mistakes_are_one_line(more: list[str], words: str, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(command(place, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("circuits: error:")


def test_a_folder_of_another_run_is_left_alone(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    assert main(command(place, out, "--tokens", "256")) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    capsys.readouterr()
    assert main(command(place, out, "--tokens", "384")) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def test_flags_are_the_fields_of_the_settings() -> None:
    """What is read from the source text equals what the dataclass says of itself."""
    read = {field.name: field.default for field in fields("replacement.training.config:TrainingConfig")}
    assert read == {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    assert all(field.text for field in fields("replacement.training.config:TrainingConfig"))


def test_a_bridge_that_is_replaced_by_its_own_values_is_unchanged(place: Path) -> None:
    """Writing what stood there gives the same logits, and the first position is never seen."""
    bridge, _ = load_bridge(place / "model", torch.float32, "cpu")
    names = sites(plans(TrainingConfig(n_features=32), 3))
    model = ReplaceableBridge(bridge, names)
    tokens = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    where = torch.ones_like(tokens, dtype=torch.bool)
    logits, found = model.original(tokens, where)
    assert {tensor.shape[0] for tensor in found.values()} == {2 * 8} == {len(logits)}

    class Same:
        def read(self, name, x):
            self.shape = x.shape

        def write(self, name):
            return found[name].view(self.shape)

    torch.testing.assert_close(model.replaced(tokens, where, Same()), logits)
