"""What happens after each step of a run: it is told, kept now and then, and is the last one where somebody wants that.

Ctrl-C waits until the step is finished and kept. Knows nothing of what a step is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from replacement.errors import InputError
from replacement.training.parallel import Mesh
from replacement.training.report import Listener, Record, bar_listener


class _Stop:
    """Whether somebody wants the run to end: by Ctrl-C, or by the signal that schedulers send before they kill."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.heard = mesh, False

    @property
    def wanted(self) -> bool:
        """Of any process of the run; all of them have to ask after the same step."""
        return bool(self.mesh.world.any(torch.tensor(self.heard)))


@contextmanager
def watched(
    stage: str,
    span: tuple[int, int, int],
    *,
    checkpoint: Path | None,
    keep: Callable[[Path, int], None],
    every: int,
    listeners: Sequence[Listener],
    show: bool,
    mesh: Mesh,
) -> Iterator[Listener]:
    """What all processes call after each step of a stage, with its record.

    span: steps done before, steps that will be done now, steps of the whole stage. checkpoint: where the state is kept,
    None for nowhere. keep: puts it there, after so many steps. every: how often. listeners: of the first process. show:
    whether it has a progress bar. Raises `KeyboardInterrupt`, with words for what is kept, after a step in which
    somebody wanted the run to stop.
    """
    if every < 1:
        raise InputError(f"train(checkpoint_every={every}): needs at least 1")
    done, last, steps = span
    with (
        bar_listener(stage, done=done, steps=steps, show=show and mesh.is_first) as bar,
        _patient(mesh, keeps=checkpoint is not None) as stop,
    ):

        def after(record: Record) -> None:
            for listener in (bar, *listeners) if mesh.is_first else ():
                listener(record)
            ends = stop.wanted
            if checkpoint is not None and (record.step % every == 0 or record.step == last or ends):
                keep(checkpoint, record.step)
            if ends:
                raise KeyboardInterrupt(f"{record.step} of {steps} steps ({stage}) are kept")

        yield after


@contextmanager
def _patient(mesh: Mesh, *, keeps: bool) -> Iterator[_Stop]:
    """Between steps the loop asks whether to stop; a second Ctrl-C does not wait for that.

    keeps: whether there is a checkpoint to keep a step in; without one nothing is changed. Nor is it where a signal is
    ignored (as by nohup), and outside a program's main thread, where Python leaves no signals to be caught.
    """
    stop, before = _Stop(mesh), {}

    def hear(number: int, frame: FrameType | None) -> None:
        if stop.heard:
            raise KeyboardInterrupt
        stop.heard = True

    if keeps and threading.current_thread() is threading.main_thread():
        heard = [one for one in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(one) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
