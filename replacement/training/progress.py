"""The progress bar of long work, on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(*, show: bool) -> Progress:
    """A rich bar with a count, the time left and one figure that the caller updates as `task.fields["figure"]`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figure]}"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not show, transient=False)
