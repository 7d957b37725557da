"""An evaluation as it goes on: verdicts by category, and how long it will still take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.table import Table

from ..progress import console, progress_bar, progress_display
from .judge import Verdict
from .prompts import Category
from .runs import Answer
from .wording import title


@contextmanager
def live_verdicts(label: str, total: int, *, enabled: bool = True) -> Iterator[Callable[[Answer], None]]:
    """Yield the function to give each of `total` answers to when it is finished.

    On a terminal a table of verdicts grows over a bar with elapsed time and ETA, and goes at the end; elsewhere one line is left.
    """
    if not (enabled and console.is_terminal):
        with progress_bar(label, total, enabled=enabled) as advance:
            yield lambda _: advance(1)
        return
    counts: Counter[tuple[Category, Verdict]] = Counter()
    bar = progress_display()
    task = bar.add_task(label, total=total)

    def note(answer: Answer) -> None:
        counts[answer.category, answer.verdict] += 1
        bar.advance(task)

    with Live(get_renderable=lambda: Group(_table(counts), bar), console=console, refresh_per_second=4, transient=True):
        yield note


def _table(counts: Counter[tuple[Category, Verdict]]) -> Table:
    table = Table("category")
    for verdict in Verdict:
        table.add_column(verdict, justify="right")
    for category in Category:
        if any(counts[category, verdict] for verdict in Verdict):
            table.add_row(title(category), *(str(counts[category, verdict]) for verdict in Verdict))
    return table
