"""Laws of dashboards: what they are sent is the record of the step, and one that is not there is told in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replacement.errors import InputError
from replacement.formats import drafts
from replacement.training import report
from replacement.training.progress import progress_bar
from replacement.training.report import JSONLog, Record, bar_listener, dashboard

FIGURES = {"loss": 0.5, "fvu": 0.25, "l0": 16.0, "dead": 0.125, "learning_rate": 1e-3, "seconds": 2.0, "tokens": 40}


def record(step: int) -> Record:
    return Record(stage="reconstruction", step=step, steps=2, tokens_per_second=8.0, **FIGURES)  # type: ignore[arg-type]


class Recorder:
    """Stands in for a dashboard's package, and keeps what it is sent."""

    def __init__(self) -> None:
        self.opened: list[Any] = []
        self.sent: list[dict[str, float]] = []
        self.steps: set[int] = set()
        self.flushed = 0

    def SummaryWriter(self, folder: str) -> Recorder:
        self.opened.append(folder)
        return self

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.steps.add(step)
        self.sent.append({key: value})

    def flush(self) -> None:
        self.flushed += 1

    def init(self, **settings: Any) -> SimpleNamespace:
        self.opened.append(settings)
        return SimpleNamespace(log=self.sent.append)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_every_figure_of_a_record_reaches_the_dashboard(name: str, monkeypatch) -> None:
    """Under the stage's name, without what the step lacks; TensorBoard has written all when the stage is done."""
    package = Recorder()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, package)
    send = dashboard(name, Path("runs/clt"), {"model": "atlas"})
    for step in (1, 2):
        send(record(step))
    sent = {key: value for one in package.sent for key, value in one.items()}
    assert {f"reconstruction/{key}": value for key, value in FIGURES.items()}.items() <= sent.items()
    assert not any("kl" in key or "steps" in key for key in sent)
    if name == "tensorboard":
        assert (package.opened, package.steps, package.flushed) == (["runs/clt"], {1, 2}, 1)
    else:
        assert package.opened == [{"project": "circuits", "name": "clt", "config": {"model": "atlas"}}]


def test_tensorboard_reads_back_what_was_sent(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send = dashboard("tensorboard", tmp_path, {})
    for step in (1, 2):
        send(record(step))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in found.Scalars("reconstruction/fvu")] == [0.25, 0.25]


def test_a_dashboard_that_is_not_there_is_told_in_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="dashboard 'trackio': is not installed; pip install trackio"):
        dashboard("trackio", tmp_path, {})
    with pytest.raises(InputError, match="needs one of tensorboard, wandb, trackio"):
        dashboard("aim", tmp_path, {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_dashboard_that_refuses_is_told_in_one_line(name: str, tmp_path: Path, monkeypatch) -> None:
    """Nobody logged in, no network: whatever class of error it has for that."""

    def init(**_) -> None:
        raise RuntimeError("api_key not configured (no-tty).\n call login()")

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    with pytest.raises(InputError, match=rf"dashboard '{name}': cannot begin \(RuntimeError: api_key not .*\); log in"):
        dashboard(name, tmp_path, {})


def test_a_log_of_other_bytes_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"stage": "reconstruction", "step": 1}\n7\n{"stage": "recon\xff\xfe\n')
    JSONLog(path)(record(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_log_on_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch) -> None:
    """Also where a run goes on, which writes the log anew: the old one stays, and nothing lies beside it."""
    path = tmp_path / "log.jsonl"
    lines = "".join(json.dumps({"stage": "reconstruction", "step": step}) + "\n" for step in (1, 3))
    path.write_text(lines)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(drafts.os, "fsync", full)
    with pytest.raises(
        InputError, match=r"log\.jsonl: cannot be written \(No space left on device\); make room and go"
    ):
        JSONLog(path)(record(2))
    assert path.read_text() == lines and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
@pytest.mark.parametrize(("stage", "kl"), [("reconstruction", None), ("end to end", 0.1234)])
def test_a_progress_bar_tells_figures_first(stage: str, kl: float | None, columns: int, capsys, monkeypatch):
    """Where the line is short, the bar is left out first, then name and time; at most the end of the figure is cut, of
    80 columns no more than its unit."""
    monkeypatch.setenv("COLUMNS", str(columns))
    figures = FIGURES | {"fvu": 0.1234, "l0": 16.0, "dead": 0.001, "tokens_per_second": 12345.0, "kl": kl}
    with bar_listener(stage, done=0, steps=24414, show=True) as move:
        for step in (1, 12344, 12345):
            move(Record(stage=stage, step=step, steps=24414, **figures))  # type: ignore[arg-type]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.strip())
    bar, time = "━.{3,} " if columns > 80 else " ?", r"(\d+:\d\d:\d\d|-:--:--) "
    beside = rf"12345/24414 {time}" if columns > 40 else "12345/24414 "
    found = re.fullmatch(rf"{stage if columns > 40 else ''} ?{bar}{beside}(?P<figure>\S.+?) *", line)
    assert found is not None and len(line) <= columns, line
    whole = ("" if kl is None else "KL 0.1234 ") + "FVU 0.1234 L0 16.0 dead 0.1% 12.3k tok/s"
    figure = found["figure"]
    assert figure == whole or (columns <= 80 and figure[-1] == "…" and whole.startswith(figure[:-1]))
    assert figure.startswith(whole[:14]) and (columns < 80 or "12.3k t" in figure)


@pytest.mark.parametrize(("rate", "words"), [(512.4, "512"), (7168.0, "7.2k"), (99_949, "99.9k"), (123_456, "123k")])
def test_a_bars_rate_takes_few_characters(rate: float, words: str) -> None:
    assert report._rounded(rate) == words


def test_a_progress_bar_without_a_figure_is_long(capsys, monkeypatch) -> None:
    """There is room for it, with counts of any size."""
    monkeypatch.setenv("COLUMNS", "80")
    with progress_bar(show=True) as bar:
        bar.add_task("activations", total=100_000_000, completed=100_000_000, figure="")
    assert re.fullmatch(r"activations ━{30,40} 100000000/100000000 \S{7} *", capsys.readouterr().err.strip("\n"))
