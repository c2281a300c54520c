"""`circuits train`: every kind in one command, killed and gone on bit for bit, and mistakes in one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from circuits.cli import main
from circuits.commands.train import configure
from circuits.settings import fields
from graphs import AttributionGraph
from replacement import formats
from replacement.errors import InputError
from replacement.loading import load_bridge
from replacement.starts import start_token
from replacement.training import EndToEndConfig, TokenBatch, Trainee, TrainingConfig, plans, reconstruction
from replacement.training import train_end_to_end as end_to_end
from replacement.training.bridge import ReplaceableBridge
from replacement.training.checkpoint import write_checkpoint
from replacement.training.config import KINDS
from replacement.training.data import BridgeActivations
from replacement.training.kinds import sites
from replacement.training.run import run
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
    assert stage[-1] < stage[0] and records[-1]["stage"] == "end to end" and records[-1]["kl"] > 0
    assert records[-1]["tokens"] == 3 * 32 * 15  # no start tokens, of which every row of 16 has one
    capsys.readouterr()
    if kind in ("transcoder", "skip_transcoder", "clt"):
        traced = ["trace", PROMPT, "--model", str(place / "model"), "--dictionaries", str(out)]
        assert main([*traced, "-o", str(tmp_path / "graph"), "--format", "json"]) == 0
        assert main(command(place, out, "--kind", kind, "--tokens", "12800", "--end-to-end", "3")) == 0  # done already


def test_the_next_commands_that_a_run_prints_work(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Spaces in names, texts under another field and another context: evaluation reads what training read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, out = tmp_path / "two words.jsonl", tmp_path / "a run"
    documents = (place / "text.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    text.write_text("".join(json.dumps({"body": one}) + "\n" for one in documents))
    given = ("--data", str(text), "--tokens", "256")
    assert main(command(place, out, *given)) == 2
    assert "its fields: body; pass one of them as text_field (--text-field)\n" in capsys.readouterr().err
    assert main(command(place, out, *given, "--text-field", "body")) == 0
    printed = capsys.readouterr().out.partition("\nnext")[2]
    (_, *evaluate), (_, *trace) = (shlex.split(line) for line in printed.splitlines())
    assert main([*evaluate, "--tokens", "64", "--measure", "reconstruction", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found | {"data": str(text), "text_field": "body", "context": 16} == found
    assert trace[1] == "..."
    assert main([trace[0], PROMPT, *trace[2:], "-o", str(tmp_path / "graph"), "--format", "json"]) == 0


def test_defaults_are_not_repeated_in_the_next_commands(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(command(place, tmp_path / "run", "--tokens", "256", "--context", "128")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " eval " in line)
    assert "--context" not in line and "--text-field" not in line


@pytest.mark.parametrize("kind", ["skip_transcoder", "clt"])
@pytest.mark.parametrize("encoder", ["switch", "kronecker"])
def test_other_encoders_are_trained_and_traced_like_the_linear_one(
    kind: str, encoder: str, place: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """The run ends in a folder that says which encoder it holds; traced, its rows add up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    own = {"switch": ("--experts", "4"), "kronecker": ("--pairs", "2,2")}[encoder]
    more = ("--kind", kind, "--encoder", encoder, *own, "--tokens", "12800")
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


def dictionaries_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


@pytest.mark.parametrize("inside", ["run", "run/cache", "run/../run/a/b"])
def test_a_cache_in_the_runs_own_folder_is_refused(inside: str, place: Path, tmp_path: Path, capsys) -> None:
    """The folder would be a stranger's at its own next look: nothing of it is made."""
    assert main(command(place, tmp_path / "run", "--cache", str(tmp_path / inside))) == 2
    assert "lies in the run's own folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_cache_stands_for_the_model(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """In bfloat16 the bytes of a run without one, also of later runs, which run no model, of other kinds and sizes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more, cached = ["--tokens", "2560"], ["--cache", str(tmp_path / "activations")]
    assert main(command(place, tmp_path / "live", *more)) == 0
    capsys.readouterr()
    assert main(command(place, tmp_path / "first", *more, *cached)) == 0
    assert re.search(
        r"cache .* tokens in .*activations as bfloat16, FVU lost by that <= \d\.\de-0[5-7]\n", capsys.readouterr().out
    )
    clt = ["--kind", "clt", "--tokens", "1280"]
    assert main(command(place, tmp_path / "live-clt", *clt)) == 0
    with monkeypatch.context() as context:
        context.setattr(BridgeActivations, "harvest", None)
        assert main(command(place, tmp_path / "second", *more, *cached)) == 0
        assert main(command(place, tmp_path / "clt", *clt, *cached)) == 0
    live = dictionaries_of(tmp_path / "live")
    assert len(live) == 3 and live == dictionaries_of(tmp_path / "first") == dictionaries_of(tmp_path / "second")
    assert dictionaries_of(tmp_path / "live-clt") == dictionaries_of(tmp_path / "clt")
    longer = ["--tokens", "3840"]  # what the cache lacks is added
    assert main(command(place, tmp_path / "live-longer", *longer)) == 0
    assert main(command(place, tmp_path / "longer", *longer, *cached)) == 0
    assert dictionaries_of(tmp_path / "live-longer") == dictionaries_of(tmp_path / "longer")


@pytest.mark.parametrize("dtype", ["float32", "int8_token", "int8_channel"])
def test_a_stopped_run_on_a_cache_goes_on_bit_for_bit(dtype: str, place: Path, tmp_path: Path, monkeypatch) -> None:
    """Also where the cache that it began on is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bridge, _ = load_bridge(place / "model", torch.float32, "cpu")
    settings = {"model": "model", "data": str(place / "text.txt"), "context": 16, "checkpoint_every": 10}
    settings |= {"cache": tmp_path / "activations", "cache_dtype": dtype, "show_progress": False}
    settings["config"] = TrainingConfig(n_features=32, k=4, batch_tokens=128, buffer_bytes=200_000, tokens=3840)
    whole = run(bridge, out=tmp_path / "whole", **settings)
    assert whole.cache.dtype == dtype and whole.cache.tokens >= 3840 + 128
    assert all((0 < fvu < 1e-3) if dtype != "float32" else fvu == 0 for fvu in whole.cache.fvu.values())

    def write(*arguments, step: int, **rest) -> None:
        write_checkpoint(*arguments, step=step, **rest)
        if step == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(reconstruction, "write_checkpoint", write)
        run(bridge, out=tmp_path / "stopped", **settings)
    shutil.rmtree(tmp_path / "activations")
    run(bridge, out=tmp_path / "stopped", **settings)
    assert dictionaries_of(tmp_path / "whole") == dictionaries_of(tmp_path / "stopped")


def test_a_cache_of_something_else_is_refused(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """In one line, before the run has a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = ["--tokens", "128", "--cache", str(tmp_path / "activations")]
    assert main(command(place, tmp_path / "run", *cached)) == 0
    for more, words in {
        ("--kind", "sae"): "sites blocks.0.mlp.hook_in",
        ("--seed", "1"): "of other weights, texts, rows or seed",
        ("--context", "12"): "of other weights, texts, rows or seed",
        ("--cache-dtype", "int8_token"): "holds other activations (dtype bfloat16); pass another folder",
        ("--cache-dtype", "int4"): "(dtype='int4'): needs one of bfloat16, float32, int8_token, int8_channel",
        ("--cache", str(place)): "holds model, and no activations; pass a new folder",
    }.items():
        capsys.readouterr()
        assert main(command(place, tmp_path / "other", *cached, *more)) == 2
        err = capsys.readouterr().err
        assert words in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "other").exists()
    assert main(command(place, tmp_path / "other", "--cache-dtype", "float32")) == 2
    assert "is how a cache keeps activations; pass cache, or leave it out" in capsys.readouterr().err


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
        (["--log-to", "nothing"], "needs one of tensorboard"),
    ],
)
def test_mistakes_are_one_line(more: list[str], words: str, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(command(place, tmp_path / "run", *more)) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.strip().splitlines()) == 1 and err.startswith("circuits: error:")
    assert not (tmp_path / "run").exists()


def test_every_flag_can_be_given_under_torchrun() -> None:
    """Which reads what follows the program's name too, and refuses beginnings of its own flags as ambiguous."""
    configure(parser := argparse.ArgumentParser(add_help=False))

    def reaches_us(flag: str) -> bool:
        try:
            given = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "circuits", "train", flag, "1"])
        except SystemExit:
            return False
        return given.training_script_args == ["train", flag, "1"]

    lost = [action.option_strings for action in parser._actions if not any(map(reaches_us, action.option_strings))]
    assert not lost and not reaches_us("--start")


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


def test_the_last_stages_flags_are_its_fields_too(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """All of them reach the stage; without the stage they are refused, not ignored."""
    own = dataclasses.fields(EndToEndConfig)
    read = {field.name: field.default for field in fields("replacement.training.config:EndToEndConfig")}
    assert read == {field.name: field.default for field in own}
    seen = []
    monkeypatch.setattr(
        "replacement.training.run.run", lambda bridge, **given: seen.append(given["end_to_end"]) or 1 / 0
    )
    values = {"steps": 3, "documents": 5, "k": 2, "layers": (0, 1), "seed": 7}
    values |= {field.name: 0.5 for field in own if field.type == "float"} | {"warmup_steps": 4}
    named = {"steps": "--end-to-end", "bridging_weight": "--bridging-weight"}
    flags = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags += [named.get(name, f"--end-to-end-{name.replace('_', '-')}"), text]
    with pytest.raises(ZeroDivisionError):
        main(command(place, tmp_path / "run", *flags))
    assert set(values) == {field.name for field in own} and seen == [EndToEndConfig(**values)]
    for flag, text in zip(flags[2::2], flags[3::2], strict=True):
        capsys.readouterr()
        assert main(command(place, tmp_path / "run", flag, text)) == 2
        assert f"error: {flag} {text}: is of the last stage; add --end-to-end STEPS" in capsys.readouterr().err


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


def test_start_tokens_inside_rows_are_left_to_the_model(place: Path) -> None:
    """Dictionaries neither read nor write there, and rows of a batch have as many other tokens: what one has beyond
    that, at its end, changes nothing before it."""
    bridge, _ = load_bridge(place / "model", torch.float32, "cpu")
    names = sites(plans(TrainingConfig(n_features=32), 3))
    model, start = ReplaceableBridge(bridge, names), start_token(bridge.tokenizer)
    rows = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = rows[0, 4] = start
    batch = model.documents(rows)
    text = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    assert not batch.answer.any() and torch.equal(batch.tokens[text], rows[text])
    with pytest.raises(InputError, match="a row holds start tokens alone"):
        model.documents(torch.full_like(rows, start))

    class Nothing:
        def read(self, name, x):
            torch.testing.assert_close(x, values[name][text].flatten(1) if name == names[0] else x)
            self.like = x

        def write(self, name):
            return torch.zeros_like(self.like) if name.endswith("mlp.hook_out") else None

    def empty(tensor, hook):
        return torch.where(text[..., None], 0, tensor) if hook.name.endswith("mlp.hook_out") else tensor

    whole, values = bridge.run_with_cache(rows)
    logits, found = model.original(batch.tokens, torch.ones_like(text))
    torch.testing.assert_close(logits, whole[text])
    assert all(torch.allclose(found[name], values[name][text].flatten(1), atol=1e-6) for name in names)
    wanted = bridge.run_with_hooks(rows, fwd_hooks=[(name, empty) for name in names])
    torch.testing.assert_close(model.replaced(batch.tokens, torch.ones_like(text), Nothing()), wanted[text])


def test_rows_of_one_batch_have_about_as_much_text(place: Path) -> None:
    """Rows of short documents, half of them start tokens, cut none of the others; any batch can be asked for first."""
    bridge, _ = load_bridge(place / "model", torch.float32, "cpu")
    model, start = ReplaceableBridge(bridge, ["blocks.0.mlp.hook_in"]), start_token(bridge.tokenizer)
    rows = torch.randint(3, 40, (96, 33), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = start
    rows[3::4, ::2] = start  # some in every batch of the source

    class Source:
        def batch(self, index: int, documents: int) -> torch.Tensor:
            return rows[index * documents : (index + 1) * documents].clone()

    def text(batches: list[TokenBatch]) -> int:
        return sum(int((batch.tokens != start).sum()) for batch in batches)

    batches = model.batches(Source(), 6)
    found = [batches(index) for index in range(16)]
    assert text(found) == (rows != start).sum()
    assert text([model.documents(Source().batch(index, 6)) for index in range(16)]) < 0.6 * text(found)
    for first in (0, 8):
        ours = torch.cat([batch.tokens for batch in found[first : first + 8]])
        theirs = rows[first * 6 : (first + 8) * 6]
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    anew = model.batches(Source(), 6)
    assert all(torch.equal(anew(index).tokens, found[index].tokens) for index in (12, 3, 15))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_stage_brings_a_replaced_bridge_to_the_original(kind: str, place: Path) -> None:
    """On the same documents the divergence alone, as the only loss, falls by more than a quarter."""
    bridge, _ = load_bridge(place / "model", torch.float32, "cpu")
    config = TrainingConfig(kind=kind, n_features=64, k=8)
    planned = plans(config, 3)
    model, tokens = ReplaceableBridge(bridge, sites(planned)), torch.arange(3, 51).view(4, 12)
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
    trainee, found = Trainee(planned, model.original(*batch)[1], config), list[float]()
    options = {"listeners": [lambda record: found.append(record.kl)], "show_progress": False}
    alone = EndToEndConfig(steps=15, learning_rate=1e-2, warmup_steps=3, reconstruction_weight=0.0, aux_weight=0.0)
    end_to_end(model, trainee, lambda _: batch, config=alone, **options)
    assert found[-1] < 0.75 * found[0]
