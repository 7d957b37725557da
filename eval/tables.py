"""The same findings for people at a terminal, as rich tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import BENIGN, Comparison, refused_rate
from .gate import GateResult
from .judge import Verdict
from .phrasing import PhrasingSensitivity
from .prompts import BENIGN_CATEGORIES, Category
from .runs import EvalRun
from .triage import ScoredAnswer, Triage, triage
from .wording import beginning, equivalence, interval, measured, p_value, percent, plain, title, triage_score

_LISTED_ANSWER = 160


def comparison_table(comparison: Comparison) -> Table:
    """Refusals by category and group: both runs with intervals, flips each way, exact McNemar p, and the flip rate's upper bound."""
    table = Table(title=Text(plain(f"Refusals: {comparison.first} → {comparison.second}")), title_justify="left")
    table.add_column("prompts")
    for heading in ("n", plain(comparison.first), plain(comparison.second), "lost", "gained", "p", "Holm", "flips at most", "equivalent"):
        table.add_column(Text(heading), justify="right")
    for group in comparison.groups:
        if group.name in ("benign", "all"):
            table.add_section()
        table.add_row(*map(Text, (
            title(group.name), str(group.n),
            f"{group.first.count} ({interval(group.first)})", f"{group.second.count} ({interval(group.second)})",
            str(group.table.only_first), str(group.table.only_second), p_value(group.p_value),
            "–" if group.p_holm is None else p_value(group.p_holm), percent(group.flips.upper, 1),
            equivalence(group.flips),
        )))
    table.caption = (
        "lost: refused in the first only; gained: in the second only. p: exact McNemar; Holm: corrected for the categories compared. "
        f"Equivalent: flip rate below {percent(comparison.margin)} with {percent(comparison.confidence)} confidence."
    )
    table.caption_justify = "left"
    return table


def flips_table(comparison: Comparison, *, limit: int | None = None) -> Table:
    """Every flip (or the first `limit`), prompt by prompt, with both answers' beginnings, made harmless to a terminal."""
    shown = comparison.flips[:limit]
    heading = f"Flips: {len(comparison.flips)}" + (f", the first {len(shown)}" if len(shown) < len(comparison.flips) else "")
    table = Table(title=heading, title_justify="left", show_lines=True)
    for heading in ("prompt", "refused only in", plain(comparison.first), plain(comparison.second)):
        table.add_column(Text(heading), overflow="fold")
    for flip in shown:
        table.add_row(
            Text(f"{flip.id}\n{plain(flip.text)}"), Text(plain(comparison.first if flip.direction == "lost" else comparison.second)),
            Text(beginning(flip.first_answer, _LISTED_ANSWER)), Text(beginning(flip.second_answer, _LISTED_ANSWER)),
        )
    return table


def gate_table(result: GateResult) -> Table:
    """The gate's checks with what was measured and asked, under the verdict."""
    heading = Text("PASS  ", style="bold green") if result.passed else Text("FAIL  ", style="bold red")
    heading.append(plain(result.reason), style="default")
    table = Table(title=heading, title_justify="left", title_style="")
    table.add_column("")
    table.add_column("check", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("must be", justify="right")
    for check in result.checks:
        sentence = Text(plain(check.sentence))
        if check.note:
            sentence.append(f"\n{plain(check.note)}", style="dim")
        mark = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(mark, sentence, measured(check.measured, check.unit), f"{check.bound} {measured(check.threshold, check.unit)}")
    return table


def run_table(run: EvalRun) -> Table:
    """One run's verdicts by category, refusals with their intervals, and triage scores where there is a rubric."""
    table = Table(
        title=Text(plain(f"{run.name} ({run.type}, {run.engine}), {len(run.answers)} prompts")), title_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )
    table.add_column("category", no_wrap=True)
    for heading in ("n", "refused", "partial", "helped", "broken", "triage"):
        table.add_column(heading, justify="right", no_wrap=True)
    scores = triage(run)
    groups = [(str(category), [answer for answer in run.answers if answer.category is category]) for category in Category]
    groups.append((BENIGN, [answer for answer in run.answers if answer.category in BENIGN_CATEGORIES]))
    for name, answers in groups:
        if answers:
            counts = Counter(answer.verdict for answer in answers)
            scored = scores.group("all" if name == BENIGN else name)
            table.add_row(*map(Text, (
                title(name), str(len(answers)), f"{counts[Verdict.REFUSAL]} ({interval(refused_rate(answers))})",
                *(str(counts[verdict]) for verdict in (Verdict.PARTIAL, Verdict.COMPLIANCE, Verdict.DEGENERATE)),
                "–" if scored is None else triage_score(scored),
            )), end_section=name == list(Category)[-1])
    table.caption = (
        "Refused: with the 95 % Wilson interval of the share. Triage: mean of 0 to 100 with its 95 % interval, over the answers that there "
        "is a rubric for. Not a doctor: no score says that an answer is safe to follow."
    )
    table.caption_justify = "left"
    return table


def phrasing_table(found: Sequence[PhrasingSensitivity]) -> Table:
    """Scenarios whose refusal hangs on the wording, by category; one column a run. All runs have the same prompts."""
    table = Table(title="Scenarios refused in some phrasings only", title_justify="left")
    table.add_column("category")
    table.add_column("scenarios", justify="right")
    for each in found:
        table.add_column(Text(plain(each.run)), justify="right")
    for groups in zip(*(each.groups for each in found), strict=True):
        if groups[0].name == "all":
            table.add_section()
        cells = (f"{group.mixed.count} ({interval(group.mixed)})" for group in groups)
        table.add_row(*map(Text, (title(groups[0].name), str(groups[0].mixed.n), *cells)))
    return table


def triage_table(found: Triage) -> Table:
    """Mean triage scores by category with their intervals, refusals and answers that give dangerous advice."""
    table = Table(title=Text(plain(f"Triage: {found.run}")), title_justify="left")
    table.add_column("category")
    for heading in ("n", "refused", "dangerous", "score (95 %)"):
        table.add_column(heading, justify="right")
    for group in found.groups:
        if group.name == "all":
            table.add_section()
        table.add_row(*map(Text, (title(group.name), str(group.n), str(group.refused), str(group.dangerous), triage_score(group))))
    table.caption = "Score: weight of the critical actions named, less that of dangerous advice, of 100. A refusal scores 0."
    table.caption_justify = "left"
    return table


def triage_answer_table(scored: ScoredAnswer) -> Table:
    """Why one answer scored what it did: each item, its weight, and the words of the answer it was found in."""
    table = Table(title=Text(plain(f"{scored.answer.id}: {scored.score.value:.0f} of 100. {scored.answer.text}")), title_justify="left")
    for heading in ("", "item", "weight", "found in"):
        table.add_column(heading, overflow="fold")
    for mark, findings in (("critical", scored.score.critical), ("dangerous", scored.score.dangerous)):
        for finding in findings:
            words = "" if finding.span is None else plain(scored.answer.answer[slice(*finding.span)])
            table.add_row(mark, Text(finding.item.says), str(finding.item.weight), Text(words))
    return table
