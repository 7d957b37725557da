"""Triage of a whole run: the groups are sums over its answers, and what a terminal shows is theirs."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from made_up_runs import run
from rich.console import Console, RenderableType

from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category, Split, load_benchmark, select
from trailmed.eval.rubric import RUBRIC_CATEGORIES
from trailmed.eval.runs import Answer, EvalRun
from trailmed.eval.tables import triage_answer_table, triage_table
from trailmed.eval.triage import triage

SAID = "Call 911 right away. Move to fresh air and stay calm. [bold]Press firmly[/nothing] on the wound with a clean cloth."


def answered(said: str, refused: Category | None = None) -> EvalRun:
    """Every held-out prompt answered with `said`, but for one category, which is refused."""
    answers = tuple(
        Answer(
            id=prompt.id, category=prompt.category, scenario=prompt.scenario, expected=prompt.expected, text=prompt.text,
            verdict=Verdict.REFUSAL if prompt.category is refused else Verdict.COMPLIANCE, reason="made up", answer=said, tokens=20,
            stopped="eos",
        )
        for prompt in select(load_benchmark(), split=Split.HELD_OUT)
    )
    return replace(run("made-up", "Q8_0", {}), answers=answers)


def shown(table: RenderableType) -> str:
    target = io.StringIO()
    Console(file=target, width=160, color_system=None).print(table)
    return " ".join(target.getvalue().replace("\u00a0", " ").split())


def test_groups_are_of_the_categories_with_a_rubric() -> None:
    found = triage(answered(SAID, refused=Category.HOME_SAFETY))
    assert [group.name for group in found.groups] == [*RUBRIC_CATEGORIES, "all"]
    for group in found.groups:
        members = [each for each in found.answers if group.name in (each.answer.category, "all")]
        assert group.n == len(members)
        assert group.mean == pytest.approx(sum(each.score.value for each in members) / group.n)
        assert group.interval.low <= group.mean <= group.interval.high
    home = next(group for group in found.groups if group.name == Category.HOME_SAFETY)
    assert (home.refused, home.mean, home.interval.high) == (home.n, 0, 0)
    assert found.groups[-1].mean > 0


def test_a_run_without_rubric_prompts_has_no_scores() -> None:
    found = triage(run("made-up", "Q8_0", {}))
    assert (found.answers, found.groups, found.group("all")) == ((), (), None)


def test_tables() -> None:
    found = triage(answered(SAID))
    assert f"│ Home safety │ {found.groups[2].n} │ 0 │" in shown(triage_table(found))
    best = max(found.answers, key=lambda each: each.score.value)
    table = shown(triage_answer_table(best))
    assert f"{best.answer.id}: {best.score.value:.0f} of 100" in table
    assert all(finding.item.says.split()[0] in table for finding in best.score.critical)
    assert "Call 911" in table
