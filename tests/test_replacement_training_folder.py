"""Laws of a run's folder: one run at a time, nothing trained is lost, and what may change is said."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, safe_open, save_file

from circuits.cli import main
from replacement.errors import InputError
from replacement.training import checkpoint
from replacement.training.folder import differences, to_write, write_settings
from replacement.training.parallel import ALONE
from replacement.training.sharded_checkpoint import has_checkpoint
from tests.test_circuits_train import command, dictionaries_of, place  # noqa: F401 - the fixture of a model and a text
from tests.test_replacement_training import ToyMLPs, toy_config, trained
from tests.tiny import PROMPT


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def error_of(capsys, *arguments: str) -> str:
    """The line that a refused command prints, after the progress bar where there was one."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    *_, line = captured.err.splitlines(keepends=True)
    assert line.startswith("circuits: error: ") and not captured.out and "Traceback" not in captured.err
    return line


def test_two_runs_never_share_a_folder(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """The second is refused while the first is at work; nothing of it stays, and the lock goes with the run."""
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"):
        line = error_of(capsys, *command(place, out, "--tokens", "1280"))
        assert line.endswith(f"{out}: another process trains here; wait for its end, or pass another folder\n")
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert main(command(place, out, "--tokens", "1280")) == 0
    assert (out / "config.json").exists() and not (out / ".lock").exists()


def test_a_process_killed_at_its_first_file_locks_no_folder(place: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "run"
    out.mkdir()
    for name in (".training.json.579b.part", ".lock"):
        (out / name).touch()
    assert main(command(place, out, "--tokens", "1280")) == 0
    assert not list(out.glob(".*"))


def test_settings_that_kept_nothing_can_be_corrected(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """A run that failed before its first checkpoint leaves the folder to the next one; a later one only with its own
    settings, and the refusal names what differs."""
    out = tmp_path / "run"
    assert "needs at least 1" in error_of(capsys, *command(place, out, "--checkpoint-every", "0"))
    (out / "checkpoints").mkdir(parents=True)  # as a full disk leaves it
    (out / "training.json").write_text("{}")
    rate = ("--learning-rate", "1e30", "--tokens", "2560")
    assert "lower learning_rate" in error_of(capsys, *command(place, out, *rate))
    assert main(command(place, out, "--tokens", "2560", "--checkpoint-every", "5")) == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 10, 20]
    assert "reconstruction.k 4 there, 5 here" in error_of(capsys, *command(place, out, "--k", "5", "--tokens", "2560"))
    line = error_of(capsys, *command(place, out, "--learning-rate", "1e-3", "--tokens", "2560"))
    assert "learning_rate 0.002 there, 0.001 here" in line, "what is finished is not done again in other words"


def test_a_stopped_run_goes_on_at_another_learning_rate(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """As the message of a run that diverged asks for; the folder says so."""
    out, usual = tmp_path / "run", ("--tokens", "2560", "--checkpoint-every", "8")
    assert main(command(place, out, *usual)) == 0
    for path in [out / "config.json", *out.glob("layer_*")]:  # as if it had stopped at the last checkpoint
        path.unlink()
    assert main(command(place, out, *usual, "--learning-rate", "1e-3")) == 0
    stored = json.loads((out / "training.json").read_text())
    assert stored["earlier"] == ["reconstruction.learning_rate 0.002 there, 0.001 here"]
    assert stored["reconstruction"]["learning_rate"] == 1e-3
    assert json.loads((out / "config.json").read_text())["metadata"] == stored


def test_dictionaries_of_a_run_that_is_not_finished_are_refused(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """As what they are, by every command that reads them: the folder is no damaged one, nor of a foreign format."""
    out, usual = tmp_path / "run", ("--tokens", "256")
    assert main(command(place, out, *usual)) == 0
    for path in [out / "config.json", *out.glob("layer_*")]:  # as if it had stopped at the last checkpoint
        path.unlink()
    found = ["--model", str(place / "model"), "--dictionaries", str(out)]
    evaluate = ["eval", "--data", str(place / "text.txt"), "--context", "16", *found]
    for given in (evaluate, ["trace", PROMPT, *found, "-o", str(tmp_path / "graph")]):
        line = error_of(capsys, *given)
        assert "holds a training run that is not finished; give its command again (`circuits train ...`)\n" in line
    assert main(command(place, out, *usual)) == 0
    assert main([*evaluate, "--tokens", "64", "--measure", "reconstruction"]) == 0


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_run_does_not_go_on_with_other_data_or_weights(what: str, place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """Even under the same names: its position would be another stream's."""
    shutil.copytree(place, tmp_path / "place")
    given = command(tmp_path / "place", tmp_path / "run", "--tokens", "1280")
    assert main(given) == 0
    if what == "data":
        with (tmp_path / "place" / "text.txt").open("a", encoding="utf-8") as file:
            file.write(" w3 w4")
    else:
        path = tmp_path / "place" / "model" / "model.safetensors"
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata()
        save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, metadata)
    assert "the model's weights or the data have changed since" in error_of(capsys, *given)


def test_the_bar_of_a_cache_ends_where_the_cache_does(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """Whole buffers are filled, of more tokens than the run trains on."""
    assert main(command(place, tmp_path / "run", "--tokens", "1280", "--cache", str(tmp_path / "cached"))) == 0
    (found,) = re.findall(r"activations .*?(\d+)/(\d+)", capsys.readouterr().err)
    assert found[0] == found[1] and int(found[0]) > 1280


def test_the_same_data_by_another_name_go_on(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    given = command(place, tmp_path / "run", "--tokens", "1280")
    assert main(given) == 0
    same = str(place / ".." / place.name / "text.txt")
    assert main([same if word == str(place / "text.txt") else word for word in given]) == 0


def test_a_last_stage_that_contradicts_the_first_is_refused_before_it(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """And one that has not begun can still be changed, or added, without losing the stage before it."""
    out = tmp_path / "run"
    size = ("--layers", "1", "--tokens", "1280")
    for wrong, words in {
        ("--end-to-end-layers", "2"): "the dictionaries read layers (1,)",
        ("--end-to-end-k", "999"): "k=999",
        ("--end-to-end-seed", str(1 << 40)): "needs a whole number in",
        ("--sparsity", "topk", "--end-to-end-threshold-memory", "0.5"): "belongs to sparsity='batchtopk'",
        ("--encoder", "switch", "--experts", "8", "--end-to-end-k", "5"): "have 32 features, an expert 4",
        ("--dead", "none", "--end-to-end-aux-weight", "0.5"): "dead='none' has no loss; leave it out",
    }.items():
        assert words in error_of(capsys, *command(place, out, *size, "--end-to-end", "2", *wrong))
        assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replacement.training.run.train_end_to_end", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(place, out, *size, "--end-to-end", "2"))
    kept = (out / "checkpoints" / "reconstruction.safetensors").read_bytes()
    assert main(command(place, out, *size, "--end-to-end", "3", "--end-to-end-documents", "8")) == 0
    assert (out / "checkpoints" / "reconstruction.safetensors").read_bytes() == kept
    assert json.loads((out / "training.json").read_text())["end_to_end"]["steps"] == 3
    assert "end_to_end.steps 3 there, 2 here" in error_of(capsys, *command(place, out, *size, "--end-to-end", "2"))


def test_folders_that_cannot_be_a_runs_are_named(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    """Files in its place, and settings that cannot be read."""
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: is a file; pass a folder" in error_of(capsys, *command(place, tmp_path / "file"))
    (tmp_path / "odd" / "training.json").mkdir(parents=True)
    assert "delete all of the folder to start over" in error_of(capsys, *command(place, tmp_path / "odd"))


def test_a_draft_of_a_checkpoint_keeps_nothing(tmp_path: Path) -> None:
    """As several processes leave it that were killed at their first one."""
    write_settings(tmp_path, {"k": 4})
    draft = tmp_path / "checkpoints" / "reconstruction" / "step-000000200.part"
    draft.mkdir(parents=True)
    (draft / "shard-00001.safetensors").touch()
    assert to_write(tmp_path, {"k": 8}) == {"k": 8}
    (draft / "state.json").touch()
    draft.rename(draft.with_suffix(""))
    with pytest.raises(InputError, match="k 4 there, 8 here"):
        to_write(tmp_path, {"k": 8})


def test_a_stopped_run_goes_on_with_a_cache(place: Path, tmp_path: Path) -> None:  # noqa: F811
    """Which gives the very bits of a run without one; and other data are named only where nothing else is other."""
    out, size = tmp_path / "run", ("--tokens", "2560", "--checkpoint-every", "5")
    assert main(command(place, tmp_path / "whole", *size)) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replacement.training.run.export", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(place, out, *size))
    assert main(command(place, out, *size, "--cache", str(tmp_path / "activations"))) == 0
    assert dictionaries_of(tmp_path / "whole") == dictionaries_of(out)
    old = {"source": "a", "reconstruction": {"seed": 0}}
    write_settings(tmp_path / "whole", old)
    with pytest.raises(InputError, match=r"\(reconstruction.seed 0 there, 3 here\)"):
        to_write(tmp_path / "whole", {"source": "b", "reconstruction": {"seed": 3}})
    with pytest.raises(InputError, match="the data have changed since"):
        to_write(tmp_path / "whole", {**old, "source": "b"})


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_who_stops_a_run_loses_no_step(number: signal.Signals, place: Path, tmp_path: Path) -> None:  # noqa: F811
    """The step is finished and kept, the line says so, and the same command ends with the bytes of a run in one go."""
    more = ("--tokens", "64000", "--json")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(command(place, whole, *more)) == 0
    line = [sys.executable, "-m", "circuits", *command(place, stopped, *more, "--checkpoint-every", "100000")]
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background ignores SIGINT
    )  # fmt: skip
    while process.poll() is None and not (stopped / "log.jsonl").exists():
        time.sleep(0.005)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 130 and "of 500 steps (reconstruction) are kept" in error
    assert error.endswith(f"in {stopped}; the same command goes on\n") and "Traceback" not in error
    kept = stopped / "checkpoints" / "reconstruction.safetensors"
    with safe_open(kept, "pt") as file:
        assert 0 < int(file.metadata()["step"]) < 500
    assert main(command(place, stopped, *more)) == 0
    assert dictionaries_of(stopped) == dictionaries_of(whole)


@pytest.mark.parametrize("stage", ["train", "train_end_to_end"])
def test_ctrl_c_says_whether_anything_is_kept(stage: str, place: Path, tmp_path: Path, capsys, monkeypatch) -> None:  # noqa: F811
    """Nothing is before the first checkpoint; a stage that is done stays when the next one has kept nothing."""
    out, usual = tmp_path / "run", ("--tokens", "256", "--end-to-end", "2")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(f"replacement.training.run.{stage}", stop)
        assert main(command(place, out, *usual)) == 130
    said = {
        "train": f"no step is kept in {out} yet; the same command begins anew\n",
        "train_end_to_end": f"what was kept before is still there, in {out}; the same command goes on\n",
    }
    assert capsys.readouterr().err.endswith(f"circuits: interrupted; {said[stage]}")
    assert main(command(place, out, *usual)) == 0


def _cut_moments(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, tensor in tensors.items() if name.startswith("optimizer.") and tensor.ndim == 2)
    tensors[name] = tensors[name][:3].clone()


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[1, 2] = torch.nan


@pytest.mark.parametrize(
    ("damage", "metadata", "message"),
    [
        (_cut_moments, {}, r"optimizer\.\d+\.\w+ has shape \[3, \d+\], this run needs \[\d+, \d+\]"),
        (_poison, {}, "has values that are not finite; delete it to start over"),
        (None, {"step": "two"}, "does not say which step it is of"),
        (None, {"position": "[1"}, "does not say which step it is of"),
        (None, {"position": "[1]"}, "does not say which step it is of"),
        (None, {"position": "[99, -3]"}, "does not say which step it is of"),
        (None, {"config": "{"}, "made with other settings"),
    ],
)
def test_a_checkpoint_that_is_off_is_refused(damage, metadata, message: str, tmp_path: Path) -> None:
    """An optimiser would take moments of any shape, and NaN for weights."""
    path = tmp_path / "run.safetensors"
    trained(ToyMLPs(), toy_config(), checkpoint=path, stop_after=2)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        stored = file.metadata()
    if damage is not None:
        damage(tensors)
    save_file(tensors, path, stored | metadata)
    with pytest.raises(InputError, match=message):
        trained(ToyMLPs(), toy_config(), checkpoint=path)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """A loss can still be finite when the weights no longer are."""
    path = tmp_path / "run.safetensors"
    trained(ToyMLPs(), toy_config(), checkpoint=path, stop_after=2)
    kept = path.read_bytes()
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # others may go on from it too

    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(torch.nan))
    with pytest.raises(InputError, match=r"is not finite after step 3; lower learning_rate and go on"):
        trained(ToyMLPs(), toy_config(), checkpoint=path, stop_after=3)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("what", ["a file", "a link to nowhere", "a link to itself"])
def test_a_place_that_takes_no_checkpoint_is_told_in_one_line(what: str, tmp_path: Path) -> None:
    """Looking for one there finds none, and clearing up after writing adds no mistake of its own."""
    folder = tmp_path / "checkpoints"
    if what == "a file":
        folder.touch()
    else:
        folder.symlink_to(folder if what == "a link to itself" else tmp_path / "nowhere" / "x")
    path = folder / "run.safetensors"
    assert not has_checkpoint(path)
    with pytest.raises(InputError, match=r"run\.safetensors\): cannot be written \(.+\); make room and run it again"):
        trained(ToyMLPs(), toy_config(), checkpoint=path, stop_after=1)


def test_several_processes_leave_no_draft_on_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "run.safetensors"
    kept, draft = tmp_path / "run" / "step-000000001", tmp_path / "run" / "step-000000002.part"

    def full(*_: object, **__: object) -> None:
        kept.mkdir(parents=True)
        draft.mkdir()
        (draft / "shard").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_parts", full)
    with pytest.raises(InputError, match="No space left on device"):
        checkpoint._write_together(path, {}, {}, step=2, is_spread=lambda *_: False, mesh=ALONE)
    assert kept.is_dir() and not draft.exists()


def test_differences_are_named_with_their_stage() -> None:
    old = {"a": 1, "reconstruction": {"k": 3, "x": [1]}, "end_to_end": None, "gone": 2}
    new = {"a": 1, "reconstruction": {"k": 4, "x": [1]}, "end_to_end": {"steps": 3}}
    assert differences(old, new) == {
        "reconstruction.k": "reconstruction.k 3 there, 4 here",
        "end_to_end": "end_to_end none there, {'steps': 3} here",
        "gone": "gone 2 there, none here",
    }
    assert not differences(new, new)
