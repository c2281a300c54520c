"""What a run says while it goes on: a record a step, a JSONL file, a progress bar, and other people's dashboards.

A listener is a function of a record. Knows nothing of what is trained.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from replacement.errors import InputError
from replacement.formats.drafts import write_whole
from replacement.training.progress import progress_bar


class Record(NamedTuple):
    """The figures of one step."""

    stage: str
    step: int  #: steps done
    steps: int  #: steps of the stage
    tokens: int  #: tokens that dictionaries stood at; end to end as if all batches had as many as this one
    loss: float
    fvu: float  #: of the batch, mean over written sites
    l0: float  #: features a token, mean over dictionaries
    dead: float  #: share of all features that have not fired for long
    learning_rate: float
    seconds: float  #: since the stage began or went on
    tokens_per_second: float
    kl: float | None = None  #: end to end only: KL(original || replaced), nats a token


Listener = Callable[[Record], None]
_LONG = "KL 0.1234 FVU 0.1234 L0 100.0 dead 0.1% 123k tok/s"  #: a long figure of a progress bar
DASHBOARDS = ("tensorboard", "wandb", "trackio")


class JSONLog:
    """Appends records to a file, one JSON object a line; when a run goes on, lines of steps done again are dropped."""

    def __init__(self, path: Path, *, every: int = 10) -> None:
        self.path, self.every, self._last = path, every, -1

    def __call__(self, record: Record) -> None:
        is_first, self._last = self._last < 0, record.step
        try:
            if is_first:
                self._cut(record)
            if record.step % self.every and record.step not in (1, record.steps):
                return
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record._asdict()) + "\n")
        except OSError as error:
            raise InputError(
                f"log {self.path}: cannot be written ({error.strerror or error}); make room and go on"
            ) from error

    def _cut(self, record: Record) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = [line for line in _whole_lines(self.path) if _before(line, record)]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            return
        if isinstance(found, dict):
            yield found


def _before(line: dict[str, Any], record: Record) -> bool:
    return line.get("stage") != record.stage or line.get("step", 0) < record.step


def dashboard_module(name: str) -> Any:
    """What a dashboard is sent to by; raises `InputError` for another name, or where the package is not installed."""
    if name not in DASHBOARDS:
        raise InputError(f"dashboard {name!r}: needs one of {', '.join(DASHBOARDS)}")
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(f"dashboard {name!r}: is not installed; pip install {name}") from error


def dashboard(name: str, folder: Path, settings: dict[str, Any]) -> Listener:
    """A listener that sends records to TensorBoard, Weights & Biases or Trackio; raises `InputError` where the package
    is not installed.
    """
    module = dashboard_module(name)
    if name == "tensorboard":
        writer = module.SummaryWriter(str(folder))

        def scalars(record: Record) -> None:
            for key, value in _numbers(record).items():
                writer.add_scalar(f"{record.stage}/{key}", value, record.step)
            if record.step == record.steps:
                writer.flush()  # what it still holds when the process ends is lost

        return scalars
    try:
        run = module.init(project="circuits", name=folder.name, config=settings)
    except Exception as error:  # no login, no network, a server's own: their classes are their own
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"dashboard {name!r}: cannot begin ({type(error).__name__}: {reason}); log in there, or leave it out"
        ) from error

    def log(record: Record) -> None:
        run.log({f"{record.stage}/{key}": value for key, value in _numbers(record).items()})

    return log


def _numbers(record: Record) -> dict[str, float]:
    return {k: v for k, v in record._asdict().items() if isinstance(v, (int, float)) and k != "steps"}


@contextmanager
def bar_listener(stage: str, *, done: int, steps: int, show: bool) -> Iterator[Listener]:
    """A listener that moves a progress bar on stderr."""
    with progress_bar(show=show, figure_width=len(_LONG)) as bar:
        task = bar.add_task(stage, total=steps, completed=done, figure="")

        def move(record: Record) -> None:
            figure = (
                f"FVU {record.fvu:.4f} L0 {record.l0:.1f} dead {record.dead:.1%} {_rounded(record.tokens_per_second)}"
            )
            figure = figure if record.kl is None else f"KL {record.kl:.4f} {figure}"
            bar.update(task, completed=record.step, figure=f"{figure} tok/s")

        yield move


def _rounded(rate: float) -> str:
    """Two digits and more, in few characters: 512, 7.2k, 123k."""
    return f"{rate:.0f}" if rate < 1000 else f"{rate / 1000:.1f}k" if rate < 100_000 else f"{rate / 1000:.0f}k"


class Clock:
    """Seconds and tokens a second since a stage began or went on."""

    def __init__(self) -> None:
        self.began, self.tokens = time.perf_counter(), 0

    def tick(self, tokens: int) -> tuple[float, float]:
        """Seconds since the beginning, and tokens a second, after so many more tokens."""
        self.tokens += tokens
        seconds = time.perf_counter() - self.began
        return seconds, self.tokens / max(seconds, 1e-9)
