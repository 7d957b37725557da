"""One progress display for every long piece of work, on stderr, with an estimate of the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]
"""Called with how many units were just finished."""

console = Console(stderr=True)
"""Where every display goes."""


def no_progress(_: int) -> None:
    """The silent `Advance`."""


@contextmanager
def progress_bar(label: str, total: int, *, enabled: bool = True) -> Iterator[Advance]:
    """Show a bar `label` that runs to `total` units; yields the function that advances it.

    On a terminal it is a live bar with elapsed time and ETA; elsewhere (a log, a pipe) one line at the end.
    """
    if not enabled:
        yield no_progress
        return
    with progress_display() as display:
        task = display.add_task(label, total=total)
        yield lambda units: display.advance(task, units)


def progress_display() -> Progress:
    """A display of bars, not started yet: each with its label, count, elapsed time and ETA."""
    return Progress(
        TextColumn("{task.description:<34}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(), console=console, transient=False,
    )

