"""A stopped trace goes on to the very same graph, from rows that are whole and its own, or says why not."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from circuits import attribute, attribution, cli, saved_rows
from circuits import tracer as tracer_module
from circuits.saved_rows import SavedRows
from circuits.tracer import Tracer
from graphs import AttributionGraph
from replacement import InputError, ReplacementModel, formats
from replacement.contributions import LinearEngine
from tests.tiny import PROMPT, random_set

SMALL = {"batch_size": 3, "update_interval": 2}


class Sizes:
    """What `random_set` asks of a model's configuration."""

    n_layers, d_model = 3, 24


class Killed(BaseException):
    """Stands for a signal that nobody catches."""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of short traces are kept too."""
    monkeypatch.setattr(saved_rows, "WORTH", 0.0)


def stop_after(rows: int, stop: type[BaseException]):
    """A progress callback that stops the trace once so many rows are done."""

    def progress(done: int, wanted: int) -> None:
        if done >= rows:
            raise stop

    return progress


def assert_equal(a: AttributionGraph, b: AttributionGraph) -> None:
    """Bit for bit, everything."""
    for name in ("data", "indices", "indptr"):
        assert (getattr(a.adjacency, name) == getattr(b.adjacency, name)).all()
    for name in ("bias", "bos", "untraced", "pre_activation"):
        assert (getattr(a, name) == getattr(b, name)).all()
    assert (a.dropped is None and b.dropped is None) or (a.dropped == b.dropped).all()
    assert a.settings == b.settings and a.residual == b.residual
    for column in dataclasses.fields(a.nodes):
        assert np.array_equal(getattr(a.nodes, column.name), getattr(b.nodes, column.name))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("rows", [1, 20, 41])
@pytest.mark.parametrize(
    "asked",
    [{"max_features": None}, {"max_features": 41}, {"max_features": 41, "drop": 0.01, "targets": ["w5", "w6 - w7"]}],
)
def test_a_stopped_trace_goes_on_to_the_same_graph(stop, rows, asked, tiny_model, tmp_path, monkeypatch):
    """By Ctrl-C all rows are kept; killed, those up to the last file, one a batch here."""
    if stop is Killed:
        monkeypatch.setattr(saved_rows, "EVERY", 0.0)
        monkeypatch.setattr(saved_rows, "PATIENCE", 0)
    model, asked = tiny_model("llama", "transcoder", "relu", "float32"), {**SMALL, **asked}
    whole = attribute(model, PROMPT, **asked)
    with pytest.raises(stop) as said:
        attribute(model, PROMPT, saved=SavedRows(tmp_path / "rows"), progress=stop_after(rows, stop), **asked)
    if stop is KeyboardInterrupt:
        assert "rows are kept in" in str(said.value) and "--resume goes on from there" in str(said.value)
    computed = []
    compute = LinearEngine.rows
    monkeypatch.setattr(LinearEngine, "rows", lambda self, t: computed.append(len(t.rows)) or compute(self, t))
    saved = SavedRows(tmp_path / "rows", resume=True)
    assert_equal(attribute(model, PROMPT, saved=saved, **asked), whole)
    n_rows = int(whole.nodes.has_inputs.sum())
    assert sum(computed) <= n_rows - rows
    saved.remove()
    assert not (tmp_path / "rows").exists()


def test_what_went_on_can_be_stopped_again(tiny_model, tmp_path):
    model = tiny_model()
    whole = attribute(model, PROMPT, **SMALL)
    for rows in (5, 30, 31, 60):
        with pytest.raises(KeyboardInterrupt):
            saved = SavedRows(tmp_path, resume=True)
            attribute(model, PROMPT, saved=saved, progress=stop_after(rows, KeyboardInterrupt), **SMALL)
    assert len(list(tmp_path.iterdir())) == 4
    assert_equal(attribute(model, PROMPT, saved=SavedRows(tmp_path, resume=True), **SMALL), whole)


def test_short_traces_write_nothing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real patience
    model, saved = tiny_model(), SavedRows(tmp_path / "rows")
    attribute(model, PROMPT, saved=saved)
    with pytest.raises(KeyboardInterrupt) as said:
        attribute(model, PROMPT, saved=saved, progress=stop_after(3, KeyboardInterrupt), **SMALL)
    assert str(said.value) == "" and not (tmp_path / "rows").exists()


def test_without_resume_a_trace_begins_anew(tiny_model, tmp_path):
    model = tiny_model()
    for prompt, rows in ((PROMPT, 40), ("w3 w4 w9 w9", 5)):
        with pytest.raises(KeyboardInterrupt):
            attribute(model, prompt, saved=SavedRows(tmp_path), progress=stop_after(rows, KeyboardInterrupt), **SMALL)
    assert len(list(tmp_path.iterdir())) == 1
    again = attribute(model, "w3 w4 w9 w9", saved=SavedRows(tmp_path, resume=True), **SMALL)
    assert_equal(again, attribute(model, "w3 w4 w9 w9", **SMALL))


OTHERS = {
    "prompt": {"prompt": "w3 w14 w15 w9 w26 w5 w36"},
    "targets": {"targets": "w7"},
    "drop": {"drop": 0.01},
    "max_features": {"max_features": 50},
    "update_every": {"update_interval": 3},
    "engine": {"engine": "autograd"},
    "trace_bos": {"trace_bos": True},
    "mlp": {"mlp": "jacobian"},
    "dictionaries": {"kind": "skip_transcoder"},
    "dtype": {"dtype": "float32"},
    "model": {"family": "qwen3"},
}


@pytest.mark.parametrize("what", OTHERS)
def test_rows_of_another_trace_are_refused_and_kept(what, tiny_model, tmp_path):
    """What differs is named, on one line."""
    made = {"family": "llama", "kind": "transcoder", "activation": "relu", "dtype": "float64"}
    with pytest.raises(KeyboardInterrupt):
        saved = SavedRows(tmp_path)
        attribute(tiny_model(**made), PROMPT, saved=saved, progress=stop_after(9, KeyboardInterrupt), **SMALL)
    asked = {**SMALL, **OTHERS[what]}
    model = tiny_model(**{name: asked.pop(name, value) for name, value in made.items()})
    with pytest.raises(
        InputError, match=rf"--resume: the rows in .* are of another trace \(.*{what}.*\); leave"
    ) as said:
        attribute(model, asked.pop("prompt", PROMPT), saved=SavedRows(tmp_path, resume=True), **asked)
    assert "\n" not in str(said.value)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("part", ["W_dec", "b_dec", "W_skip"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_decoders_are_another_trace(part, dtype, tiny_model, tmp_path):
    """Though all features and logits are the same; by as little as 0.1 %, of one layer."""
    model = tiny_model("llama", "skip_transcoder", "relu", dtype)
    with pytest.raises(KeyboardInterrupt):
        saved = SavedRows(tmp_path)
        attribute(model, PROMPT, saved=saved, progress=stop_after(9, KeyboardInterrupt), **SMALL)
    dictionaries = random_set("llama", "skip_transcoder", "relu", Sizes)
    again = ReplacementModel(model.bridge, dictionaries, name=model.name)
    attribute(again, PROMPT, saved=SavedRows(tmp_path, resume=True), **SMALL)
    with torch.no_grad():
        getattr(dictionaries.by_layer[1], part).mul_(1.001)
    changed = ReplacementModel(model.bridge, dictionaries, name=model.name)
    with pytest.raises(InputError, match=r"trace \(other (writes|errors) at L1.mlp.*: the weights have changed"):
        attribute(changed, PROMPT, saved=SavedRows(tmp_path, resume=True), **SMALL)


@pytest.mark.parametrize("swapped", [False, True])
def test_another_direction_is_another_trace(swapped, tiny_model, tmp_path):
    """Of the same label and length; and two in another order."""
    first, second = torch.eye(Sizes.d_model, dtype=torch.float64)[:2]
    asked = ([first, second], [second, first]) if swapped else (first, second)
    with pytest.raises(KeyboardInterrupt):
        saved, stop = SavedRows(tmp_path), stop_after(9, KeyboardInterrupt)
        attribute(tiny_model(), PROMPT, targets=asked[0], saved=saved, progress=stop, **SMALL)
    with pytest.raises(InputError, match=r"are of another trace \(another directions\)"):
        attribute(tiny_model(), PROMPT, targets=asked[1], saved=SavedRows(tmp_path, resume=True), **SMALL)
    attribute(tiny_model(), PROMPT, targets=asked[0], saved=SavedRows(tmp_path, resume=True), **SMALL)


@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_damaged_rows_are_refused(damage, tiny_model, tmp_path):
    model = tiny_model()
    for rows in (5, 30):
        with pytest.raises(KeyboardInterrupt):
            saved = SavedRows(tmp_path, resume=True)
            attribute(model, PROMPT, saved=saved, progress=stop_after(rows, KeyboardInterrupt), **SMALL)
    first = min(tmp_path.iterdir())
    if damage == "missing":
        first.unlink()
    else:
        first.write_bytes(first.read_bytes()[:-100] if damage == "cut" else b"\x02" + bytes(7) + b"{}")
    with pytest.raises(InputError, match=r"--resume: the rows in .*; leave --resume out to trace anew"):
        attribute(model, PROMPT, saved=SavedRows(tmp_path, resume=True), **SMALL)


def test_ctrl_c_after_the_last_row_keeps_them_all(tiny_model, tmp_path, monkeypatch):
    """While the graph is made the rows are used up, from the last on; what is on disk by then is whole."""
    model = tiny_model()
    whole, wanted = attribute(model, PROMPT, **SMALL), []
    compute = LinearEngine.rows

    def consume(model: object, tracer: Tracer, *rest: object) -> None:
        for _ in range(5):
            tracer.blocks.pop()
        raise KeyboardInterrupt

    for late, stop, name in ((0.0, consume, "settled"), (1e9, consume, "used up"), (1e9, _interrupt, "found")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="rows are kept in"):
            patch.setattr(saved_rows, "LATE", late)
            patch.setattr(attribution, "_found" if name == "found" else "assemble", stop)
            attribute(model, PROMPT, saved=SavedRows(tmp_path / name), **SMALL)
        with monkeypatch.context() as patch:
            patch.setattr(LinearEngine, "rows", lambda self, t, n=name: wanted.append(n) or compute(self, t))
            assert_equal(attribute(model, PROMPT, saved=SavedRows(tmp_path / name, resume=True), **SMALL), whole)
    assert wanted == ["used up"] * 5


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("fault", ["full", "a file", "another trace"])
def test_a_trace_goes_on_without_its_rows(fault, tiny_model, tmp_path, monkeypatch):
    """What can't be kept is said once, and neither ends the trace nor replaces what Ctrl-C says."""
    monkeypatch.setattr(saved_rows, "EVERY", 0.0)
    monkeypatch.setattr(saved_rows, "PATIENCE", 0)
    model, folder, said = tiny_model(), tmp_path / "rows", []
    other = SavedRows(folder)
    if fault == "full":
        monkeypatch.setattr(saved_rows, "save_file", _full)
    elif fault == "a file":
        folder.write_text("mine")
    else:
        with pytest.raises(Killed), monkeypatch.context() as patch:
            patch.setattr(SavedRows, "_unlock", lambda self: None)  # still at work
            attribute(model, "w3 w4 w9", saved=other, progress=stop_after(5, Killed), **SMALL)
        files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        with pytest.raises(
            InputError, match=r"--resume: another trace writes rows in .*; wait for its end, or stop it"
        ):
            attribute(model, "w3 w4 w9", saved=SavedRows(folder, resume=True), **SMALL)
    saved = SavedRows(folder, say=said.append)
    attribute(model, PROMPT, saved=saved, **SMALL)
    saved.remove()
    (line,) = said
    reason = {"full": "No space left on device", "a file": "File exists", "another trace": "another trace writes there"}
    assert line == f"rows can't be kept in {folder} ({reason[fault]}); the trace goes on, but not after a stop"
    with pytest.raises(KeyboardInterrupt) as stop:
        saved = SavedRows(folder, say=said.append)
        attribute(model, PROMPT, saved=saved, progress=stop_after(9, KeyboardInterrupt), **SMALL)
    assert len(said) == 2 and str(stop.value) == ""
    if fault == "full":
        assert not folder.exists()
    elif fault == "a file":
        assert folder.read_text() == "mine"
    else:
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == files
        other.left()
        assert_equal(
            attribute(model, "w3 w4 w9", saved=SavedRows(folder, resume=True), **SMALL),
            attribute(model, "w3 w4 w9", **SMALL),
        )


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_of_others_stay(tiny_model, tmp_path):
    """Own names only: five digits, and drafts of those."""
    foreign = ["2024.safetensors", "000001.safetensors", ".x.safetensors.ab12.part", "00000.safetensors.bak"]
    own = ["00000.safetensors", "00007.safetensors", ".00001.safetensors.0123456789ab.part"]
    for name in foreign + own:
        (tmp_path / name).write_text("")
    saved = SavedRows(tmp_path)
    attribute(tiny_model(), PROMPT, saved=saved, **SMALL)
    saved.remove()
    assert {path.name for path in tmp_path.iterdir()} == set(foreign)


def test_less_memory_means_smaller_batches_for_what_goes_on(tiny_model, tmp_path, monkeypatch):
    """Rows that are there stay as they are; the same graph but for rounding, also when it is stopped once more."""
    model, sizes = tiny_model(), []
    asked = {"batch_size": 8, "update_interval": 2}
    whole = attribute(model, PROMPT, **asked)
    for rows in (9, 40):
        with pytest.raises(KeyboardInterrupt):
            saved = SavedRows(tmp_path, resume=True)
            attribute(model, PROMPT, saved=saved, progress=stop_after(rows, KeyboardInterrupt), **asked)
        monkeypatch.setattr(tracer_module, "MOST", 2)
    compute = LinearEngine.rows
    monkeypatch.setattr(LinearEngine, "rows", lambda self, t: sizes.append(len(t.rows)) or compute(self, t))
    monkeypatch.setattr(tracer_module, "MOST", 1)
    graph = attribute(model, PROMPT, saved=SavedRows(tmp_path, resume=True), **asked)
    assert set(sizes) == {1}
    assert (graph.adjacency.indices == whole.adjacency.indices).all()
    np.testing.assert_allclose(graph.adjacency.data, whole.adjacency.data, rtol=1e-9, atol=1e-12)


# ---- the command


@pytest.fixture
def place(tmp_path: Path, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and its dictionaries."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "dicts").mkdir()
    formats.save(random_set("llama", "transcoder", "relu", Sizes), tmp_path / "dicts", dtype="float32")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MODEL = ["--model", "model", "--dictionaries", "dicts", "--format", "native"]


def _interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a sweep."""
    compute, made = LinearEngine.rows, []

    def rows(self: LinearEngine, targets: object) -> object:
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(targets)
        return compute(self, targets)

    monkeypatch.setattr(LinearEngine, "rows", rows)


def test_ctrl_c_says_how_to_go_on_and_resume_does(place: Path, capsys, monkeypatch):
    command = ["trace", PROMPT, *MODEL]
    assert cli.main([*command, "-o", "whole"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        _interrupt_after(2, patch)
        assert cli.main([*command, "-o", "out"]) == 130
    error = capsys.readouterr().err
    assert error.startswith("circuits: interrupted; ") and error.count("\n") == 1
    assert error.endswith(" rows are kept in out/circuits-rows; the same command with --resume goes on from there\n")
    assert {path.name for path in (place / "out").iterdir()} == {"circuits-rows"}
    assert cli.main(["trace", "w3 w4", *MODEL, "-o", "out", "--resume"]) == 2
    assert "are of another trace (another prompt)" in capsys.readouterr().err
    assert cli.main([*command, "-o", "out", "--resume", "--memory", "1GB"]) == 0
    assert {path.name for path in (place / "out").iterdir()} == {"graph.safetensors"}
    stored = [(place / folder / "graph.safetensors").read_bytes() for folder in ("out", "whole")]
    assert stored[0] == stored[1]


def test_resume_says_where_there_is_nothing_to_go_on_from(place: Path, capsys):
    assert cli.main(["trace", "w3 w4", *MODEL, "-o", "out", "--resume"]) == 0
    assert capsys.readouterr().err == "circuits: --resume: no stopped trace has left rows in out; tracing anew\n"
    assert cli.main(["trace", "w3 w4", *MODEL, "-o", "out", "--resume", "--dry-run"]) == 2
    assert "--dry-run: traces nothing, so there is nothing to go on with; leave --resume out" in capsys.readouterr().err


def test_of_many_prompts_the_stopped_one_goes_on_too(place: Path, capsys, monkeypatch):
    (place / "list.txt").write_text("w3 w14 w15\nw9 w26 w5\n")
    command = ["trace", "--prompts", "list.txt", *MODEL, "-o", "out"]
    with monkeypatch.context() as patch:
        _interrupt_after(6, patch)
        assert cli.main(command) == 130
    error = capsys.readouterr().err
    assert error.startswith("circuits: interrupted; 1 prompts are done, in out; the same command goes on from there; ")
    assert "of the next one " in error and "are kept in out/0002-w9-w26-w5/circuits-rows" in error
    assert error.count("\n") == 1
    assert cli.main([*command, "--resume"]) == 0
    assert not list((place / "out").rglob("circuits-rows"))
