"""The progress bar of long work, on stderr, and a line for work whose length is not known."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Column

_WIDTHS = (4, 40)  #: least and most of the bar
_SHORT, _MIDDLE = 30, 45  #: columns beside the figure from which there is name and time, and a bar
_TIME, _GAPS = len("0:00:00"), 4


class _Bar(BarColumn):
    """A bar that takes what the line's other parts leave of the terminal."""

    def __init__(self, console: Console, figure_width: int) -> None:
        super().__init__()
        self._console, self._figure_width = console, figure_width

    def render(self, task: Task) -> ProgressBar:
        count = 2 * len(str(int(task.total or 0))) + 1
        left = self._console.width - len(task.description) - count - _TIME - self._figure_width - _GAPS
        least, most = _WIDTHS
        self.bar_width = min(max(left, least), most)
        return super().render(task)


def waiting(words: str, *, show: bool) -> AbstractContextManager[object]:
    """A line with these words on a terminal's stderr, until the work is done."""
    return Console(stderr=True).status(words) if show else nullcontext()


def progress_bar(*, show: bool, figure_width: int = 0) -> Progress:
    """A rich bar with a count, the time left and one figure that the caller updates as `task.fields["figure"]`.

    Where the line is too short for all, the bar goes first, then name and time; at last the end of the figure is cut.
    figure_width: characters of a long figure; room for it is left from the beginning.
    """
    console = Console(stderr=True)
    name, time = TextColumn("{task.description}"), TimeRemainingColumn(table_column=Column(no_wrap=True))
    count = MofNCompleteColumn(table_column=Column(no_wrap=True))
    figure = TextColumn("{task.fields[figure]}", table_column=Column(no_wrap=True, ratio=1))  # gets what is left
    columns: tuple[ProgressColumn, ...] = (count, figure)
    if console.width >= _SHORT + figure_width:
        bar = [_Bar(console, figure_width)] if console.width >= _MIDDLE + figure_width else []
        columns = (name, *bar, count, time, figure)
    return Progress(*columns, console=console, disable=not show, transient=False, expand=True)
