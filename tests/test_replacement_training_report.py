"""Laws of dashboards: what they are sent is the record of the step, and one that is not there is told in one line."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replacement.errors import InputError
from replacement.formats import drafts
from replacement.training.report import JSONLog, Record, dashboard

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
