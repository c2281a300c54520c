"""Many prompts: one folder each, bad ones told at the end, done ones skipped, shares that cover the list."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep

import pytest

from circuits import cli
from circuits.prompts import Outcome, Prompt, Share, gather, read_prompts, trace_all
from replacement import InputError, formats
from tests.tiny import CONTEXT, random_set

ROOT = Path(__file__).resolve().parents[1]


class Sizes:
    """What `random_set` asks of a model's configuration."""

    n_layers, d_model = 3, 24


@pytest.fixture
def place(tmp_path: Path, tiny_folder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model, its dictionaries, and a list of prompts of which the third is bad."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "dicts").mkdir()
    formats.save(random_set("llama", "transcoder", "relu", Sizes), tmp_path / "dicts", dtype="float32")
    (tmp_path / "list.txt").write_text("w3 w14 w15\n\n   \nw9 w26\nw3 w144\nw5 w35 w7\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


TRACE = ["trace", "--prompts", "list.txt", "--model", "model", "--dictionaries", "dicts", "-o", "out"]
TRACE += ["--format", "native,json"]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _times(folder: Path) -> dict[str, int]:
    """When each graph was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/graph.safetensors")}


# ---- the command


def test_each_prompt_gets_a_folder_and_a_bad_one_is_told_at_the_end(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(TRACE) == 1
    said = capsys.readouterr()
    folders = {"0001-w3-w14-w15", "0002-w9-w26", "0004-w5-w35-w7"}
    assert {path.name for path in (place / "out").iterdir()} == folders | {"prompts.jsonl"}
    for folder in folders:
        files = {path.name for path in (place / "out" / folder).iterdir()}
        assert files == {"graph.json", "graph.safetensors", "prompt.json"}
    assert said.err.count("\n") == 1
    assert said.err.startswith("circuits: prompt 3: prompt: 'w144' is not in the vocabulary")
    assert "3 traced, 1 failed" in said.out
    assert max(map(len, said.out.splitlines())) <= 100
    lines = _lines(place / "out/prompts.jsonl")
    assert [line["number"] for line in lines] == [1, 2, 3, 4]
    assert [line.get("folder") for line in lines] == ["0001-w3-w14-w15", "0002-w9-w26", None, "0004-w5-w35-w7"]
    assert "'w144'" in lines[2]["error"]
    assert {"prediction", "replacement_score", "completeness_score", "seconds"} <= lines[0].keys()


def test_a_folder_holds_what_tracing_that_prompt_alone_writes(place: Path):
    assert cli.main(TRACE) == 1
    alone = ["trace", "w9 w26", *TRACE[3:-4], "-o", "alone", "--format", "native"]
    assert cli.main(alone) == 0
    stored = (place / "alone/graph.safetensors").read_bytes()
    assert (place / "out/0002-w9-w26/graph.safetensors").read_bytes() == stored


def test_a_second_run_does_only_what_is_missing(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(TRACE) == 1
    first, listing = _times(place / "out"), _lines(place / "out/prompts.jsonl")
    (place / "out/0002-w9-w26/graph.json").unlink()
    (place / "list.txt").write_text("w3 w14 w15\nw9 w26\nw3 w4\nw5 w35 w7\n")  # the bad prompt is put right
    capsys.readouterr()
    assert cli.main([*TRACE, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["skipped"], answer["failed"]) == (2, 0)
    assert [one["skipped"] for one in answer["prompts"]] == [True, False, False, True]
    second = _times(place / "out")
    changed = {name for name, time in second.items() if first.get(name) != time}
    assert changed == {"0002-w9-w26", "0003-w3-w4"}
    again = _lines(place / "out/prompts.jsonl")
    assert [line["number"] for line in again] == [1, 2, 3, 4]
    assert again[0] == listing[0] | {"skipped": True}, "what was found before is told again"


@pytest.mark.parametrize(
    "change", [["--max-features", "5"], ["--node-threshold", "0.5"], ["--target", "w5"], ["--trace-bos"]]
)
def test_other_settings_make_every_folder_anew(change: list[str], place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "list.txt").write_text("w3 w14 w15\n")
    assert cli.main(TRACE) == 0
    assert cli.main([*TRACE, *change]) == 0
    capsys.readouterr()
    assert cli.main([*TRACE, *change, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 1
    assert cli.main([*TRACE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 0


def test_an_entry_of_a_jsonl_names_its_own_target(place: Path, capsys: pytest.CaptureFixture[str]):
    entries = [{"prompt": "w3 w4", "target": "w5"}, {"prompt": "w3 w4"}, {"prompt": "w3 w4", "target": ["w6", "w7"]}]
    (place / "list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    command = ["trace", "--prompts", "list.jsonl", *TRACE[3:], "--target", "w8"]
    assert cli.main(command) == 0
    stored = [json.loads((place / f"out/000{number}-w3-w4/graph.json").read_text()) for number in (1, 2, 3)]
    targets = [sorted(node["clerp"] for node in one["nodes"] if node["feature_type"] == "logit") for one in stored]
    assert [[words for words in ("w5", "w6", "w7", "w8") if any(words in c for c in one)] for one in targets] == [
        ["w5"], ["w8"], ["w6", "w7"],
    ]  # fmt: skip


def test_ctrl_c_says_how_much_is_done_and_the_next_run_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from circuits import outputs

    calls, write = [], outputs.write

    def second_is_stopped(*given: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs, "write", second_is_stopped)
    assert cli.main(TRACE) == 130
    said = capsys.readouterr()
    assert said.err == "circuits: interrupted; 1 prompts are done, in out; the same command goes on from there\n"
    assert {path.name for path in (place / "out").iterdir()} == {"0001-w3-w14-w15", "prompts.jsonl"}
    assert cli.main([*TRACE, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["skipped"] == 1


def test_ctrl_c_of_a_real_process_is_one_line_and_leaves_no_drafts(place: Path):
    """The signal goes in as soon as the first prompt of many is done."""
    (place / "list.txt").write_text("\n".join(f"w{i} w{j}" for i in range(3, 50) for j in range(3, 50)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "circuits", *TRACE], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )  # fmt: skip
    listing = place / "out/prompts.jsonl"
    while process.poll() is None and not (listing.is_file() and listing.stat().st_size):
        sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert error.startswith("circuits: interrupted; ") and error.count("\n") == 1
    assert not [path for path in (place / "out").rglob(".*")]
    for folder in (path for path in (place / "out").iterdir() if path.is_dir()):
        assert {path.name for path in folder.iterdir()} >= {"graph.json", "graph.safetensors"}


MISTAKES = {
    "no such list": (["trace", "--prompts", "nowhere.txt", *TRACE[3:]], "can't be read (No such file"),
    "a folder": (["trace", "--prompts", "model", *TRACE[3:]], "can't be read (Is a directory)"),
    "not text": (["trace", "--prompts", "model/model.safetensors", *TRACE[3:]], "is not UTF-8 text"),
    "nothing in it": (["trace", "--prompts", "/dev/null", *TRACE[3:]], "holds no prompt; put one on a line"),
    "prompt and prompts": (["trace", "w3", *TRACE[1:]], "not allowed with argument"),
    "dry run of many": ([*TRACE, "--dry-run"], "needs one PROMPT, not --prompts"),
    "a number that no prompt can take": ([*TRACE, "--max-features", "-1"], "max_features=-1): must be 0 or more"),
    "an unknown rule": ([*TRACE, "--mlp", "magic"], "mlp='magic': needs one of relp"),
    "an unknown engine": ([*TRACE, "--engine", "steam"], "engine 'steam': needs one of linear"),
    "a share in percent": ([*TRACE, "--drop", "5"], "drop=5.0): must be in [0, 1)"),
    "no amount of memory": ([*TRACE, "--memory", "lots"], "memory='lots'): needs a number of bytes"),
    "no such model": ([*TRACE[:3], "--model", "./nowhere", "-o", "out"], "no such directory"),
    "output is a file": ([*TRACE, "-o", "list.txt"], "is a file, needs a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_about_the_list_is_one_line_and_nothing_written(
    mistake: str, place: Path, capsys: pytest.CaptureFixture[str]
):
    command, line = MISTAKES[mistake]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert line in said.err
    assert said.err.count("\n") == 1
    assert not (place / "out").exists()


def test_rank_and_world_size_that_do_not_fit_are_a_mistake(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(TRACE) == 2
    assert "needs whole numbers, 0 <= RANK < WORLD_SIZE" in capsys.readouterr().err


# ---- its parts


def _run(
    root: Path,
    prompts: list[Prompt],
    trace: Callable[[Prompt, Path], dict],
    share: Share = Share(),  # noqa: B008
) -> list[Outcome]:
    return list(trace_all(prompts, root=root, trace=trace, settings={}, files=["a"], share=share))


def _writes(prompt: Prompt, folder: Path) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(prompt.text)
    return {"length": len(prompt.text), "seconds": 1.0}


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shares_cover_the_list_once_and_are_put_together_in_order(processes: int, tmp_path: Path):
    prompts = [Prompt(number, f"p{number}") for number in range(1, 6)]
    for rank in range(processes):
        _run(tmp_path, prompts, _writes, Share(rank, processes))
    together = gather(tmp_path, Share(0, processes))
    assert [one.number for one in together] == [1, 2, 3, 4, 5]
    assert [one.found for one in together] == [{"length": 2}] * 5
    assert [line["number"] for line in _lines(tmp_path / "prompts.jsonl")] == [1, 2, 3, 4, 5]
    assert all(one.skipped for one in _run(tmp_path, prompts, _writes)), "what processes shared, one finds done"


@pytest.mark.parametrize("problem", [InputError("no"), MemoryError("too long"), RuntimeError("two\nlines")])
def test_whatever_a_prompt_raises_the_next_one_is_traced(problem: Exception, tmp_path: Path):
    def trace(prompt: Prompt, folder: Path) -> dict:
        if prompt.number == 1:
            raise problem
        return _writes(prompt, folder)

    first, second = _run(tmp_path, [Prompt(1, "a"), Prompt(2, "b")], trace)
    assert first.error is not None and "\n" not in first.error
    assert second.folder == "0002-b"
    assert not (tmp_path / "0001-a").exists()


def test_a_prompt_that_fails_the_second_time_is_not_taken_for_done(tmp_path: Path):
    def fails(prompt: Prompt, folder: Path) -> dict:
        raise InputError("no")

    _run(tmp_path, [Prompt(1, "a b")], _writes)
    assert _run(tmp_path, [Prompt(1, "a  b")], fails)[0].error == "no"  # the same folder, another prompt
    assert not _run(tmp_path, [Prompt(1, "a b")], _writes)[0].skipped


def test_the_listing_has_a_line_as_soon_as_a_prompt_is_done(tmp_path: Path):
    seen = []

    def trace(prompt: Prompt, folder: Path) -> dict:
        seen.append(len(_lines(tmp_path / "prompts.jsonl")))
        return _writes(prompt, folder)

    _run(tmp_path, [Prompt(number, "x") for number in (1, 2, 3)], trace)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"prompt": "a"}'])
def test_a_damaged_record_makes_the_folder_anew(damage: str, tmp_path: Path):
    _run(tmp_path, [Prompt(1, "a")], _writes)
    (tmp_path / "0001-a/prompt.json").write_text(damage)
    assert not _run(tmp_path, [Prompt(1, "a")], _writes)[0].skipped


def test_prompts_are_read_as_they_come(monkeypatch: pytest.MonkeyPatch):
    """Standard input may be a pipe that has not ended: the first prompt is there before the last is read."""

    def lines():
        yield "a b \n"
        yield "\n"
        raise AssertionError("read ahead")

    monkeypatch.setattr("sys.stdin", lines())
    assert next(read_prompts("-")) == Prompt(1, "a b ")


def test_standard_input_is_a_list_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\r\n \nc"))
    assert [prompt.text for prompt in read_prompts("-")] == ["a b", "c"]


FAULTS = {
    "{": "is not JSON",
    "[" * 100_000: "is not JSON",
    '"a"': "needs an object with 'prompt'",
    '{"prompt": 3}': "needs an object with 'prompt', a text",
    '{"prompt": "a", "targets": []}': "has 'targets'; needs 'prompt' and perhaps 'target'",
    '{"prompt": "a", "target": 3}': "needs a text, or a list of texts",
    '{"prompt": "a", "target": [3]}': "needs a text, or a list of texts",
}


@pytest.mark.parametrize("line", FAULTS, ids=lambda line: line[:20])
def test_an_entry_that_is_no_prompt_fails_alone(line: str, tmp_path: Path):
    (tmp_path / "list.jsonl").write_text(f'{line}\n{{"prompt": "b"}}\n')
    first, second = _run(tmp_path, list(read_prompts(str(tmp_path / "list.jsonl"))), _writes)
    assert FAULTS[line] in str(first.error)
    assert (second.prompt, second.error) == ("b", None)


def test_a_prompt_past_the_context_fails_alone(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "list.txt").write_text("w3 " * CONTEXT + "\nw4 w5\n")
    assert cli.main(TRACE) == 1
    assert f"takes at most {CONTEXT}" in capsys.readouterr().err
    assert (place / "out/0002-w4-w5/graph.json").is_file()
