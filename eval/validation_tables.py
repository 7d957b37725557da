"""What `validate` and the second judge found, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .agreement import Agreement
from .compare import Rate
from .judge import Verdict
from .statistics import Interval
from .validate import JudgeValidation, RubricValidation
from .wording import beginning, interval, percent, plain, title

_LISTED_ANSWER = 300


def judge_tables(found: JudgeValidation) -> list[Table]:
    """The confusion table with recall, precision and F1, and the agreement by source and language."""
    table = agreement_table(found.overall, "judge", f"The judge against labels: {found.overall.n} answers ({found.half})")
    table.caption = (
        f"{table.caption} Refusals of harmful requests judged compliance: {found.refusals_missed}."
    )
    parts = Table(title="Labels met", title_justify="left")
    for heading in ("answers of", "right", "share (95 %)"):
        parts.add_column(heading, justify="left" if heading == "answers of" else "right")
    for group in (found.by_source, found.by_language):
        parts.add_section()
        for name, rate in group.items():
            parts.add_row(name, f"{rate.count} of {rate.n}", _share(rate))
    return [table, parts]


def agreement_table(found: Agreement, judge: str, heading: str) -> Table:
    """Counts of labels (rows) and the verdicts of `judge` (columns), with each label's recall, precision and F1."""
    table = Table(title=Text(plain(heading)), title_justify="left")
    table.add_column("label", no_wrap=True)
    for name in (*Verdict, "recall (95 %)", "precision (95 %)", "F1"):
        table.add_column(name, justify="right")
    by_verdict = {each.verdict: each for each in found.classes}
    for verdict, row in zip(Verdict, found.counts, strict=True):
        each = by_verdict.get(verdict)
        figures = ("–", "–", "–") if each is None else (_share(each.recall), _share(each.precision), f"{each.f1:.3f}")
        table.add_row(verdict, *map(str, row), *figures)
    table.caption = (
        f"Columns: verdicts of the {judge}. Accuracy {_share(found.accuracy)}; macro-F1 {found.macro_f1:.3f} "
        f"({_spread(found.macro_f1_interval)}); Cohen's κ {found.kappa:.3f} ({_spread(found.kappa_interval)})."
    )
    table.caption_justify = "left"
    return table


def wrong_table(found: JudgeValidation) -> Table:
    """The answers whose verdict is not their label."""
    table = Table(title="Wrong", title_justify="left", show_lines=True)
    for heading in ("answer", "label", "verdict", "text"):
        table.add_column(heading, overflow="fold")
    for answer, verdict in found.wrong:
        table.add_row(answer.id, answer.label, verdict, Text(beginning(answer.text, _LISTED_ANSWER)))
    return table


def rubric_table(found: Sequence[RubricValidation]) -> Table:
    """Mean scores of hand-written answers by quality, and the scenarios that are ranked right."""
    table = Table(title="The rubric on hand-written answers", title_justify="left")
    table.add_column("category", no_wrap=True)
    for heading in ("scenarios", "good", "partial", "dangerous", "ranked right", "false alarms"):
        table.add_column(heading, justify="right")
    for each in found:
        means = [f"{each.means[quality]:.0f}" for quality in ("good", "partial", "dangerous")]
        table.add_row(title(each.category), str(each.scenarios), *means, f"{each.ranked.count} of {each.ranked.n}", str(each.alarms))
    table.caption = (
        "Mean score of 0 to 100. Ranked right: good above partial above dangerous. False alarm: dangerous advice found in a good answer."
    )
    table.caption_justify = "left"
    return table


def _share(rate: Rate) -> str:
    return "–" if rate.n == 0 else f"{percent(rate.share)} ({interval(rate)})"


def _spread(interval: Interval) -> str:
    return f"{interval.low:.3f}–{interval.high:.3f}"
