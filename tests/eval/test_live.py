"""The live display of an evaluation: a table on a terminal, one line elsewhere."""

from __future__ import annotations

import io

import pytest
from made_up_runs import run
from rich.console import Console

from trailmed import progress
from trailmed.eval import live
from trailmed.eval.live import live_verdicts
from trailmed.eval.prompts import Category


def _shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, enabled: bool = True) -> str:
    said = io.StringIO()
    screen = Console(file=said, force_terminal=terminal, width=100)
    monkeypatch.setattr(progress, "console", screen)
    monkeypatch.setattr(live, "console", screen)
    answers = run("a", "F16", {Category.HOME_SAFETY: 7}).answers
    with live_verdicts("answers a", len(answers), enabled=enabled) as note:
        for answer in answers:
            note(answer)
    return said.getvalue()


def test_a_terminal_sees_the_verdicts_of_each_category(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _shown(monkeypatch, terminal=True)
    home = next(line for line in reversed(shown.splitlines()) if "Home safety" in line)
    assert [cell.strip() for cell in home.split("│")[2:6]] == ["7", "0", "13", "0"]
    total = len(run("a", "F16", {}).answers)
    assert f"{total}/{total}" in shown


def test_a_log_gets_one_line_and_quiet_none(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _shown(monkeypatch, terminal=False)
    assert "answers a" in line
    assert "Home safety" not in line
    assert _shown(monkeypatch, terminal=False, enabled=False) == ""
    assert _shown(monkeypatch, terminal=True, enabled=False) == ""
