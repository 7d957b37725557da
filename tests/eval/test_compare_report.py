"""Several runs side by side: every figure in the page, safe with hostile text, runs of one name told apart."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_page import HOSTILE, Page
from made_up_runs import four_runs, run

from trailmed.errors import TrailmedError
from trailmed.eval.compare_report import SideBySide
from trailmed.eval.prompts import Category
from trailmed.eval.rubric import load_rubric
from trailmed.eval.runs import EvalRun


def _three() -> list[EvalRun]:
    runs = four_runs()
    return [runs["base_full"], runs["base_quantized"], runs["edited_quantized"]]


def test_every_figure_stands_in_both_files(tmp_path: Path) -> None:
    found = SideBySide(_three())
    page, text = found.write(tmp_path)
    html, markdown = page.read_text(), text.read_text()
    assert [(each.first, each.second) for each in found.comparisons] == [("base-F16", "base-Q8_0"), ("base-F16", "edited-Q8_0")]
    shown = Page(html).words
    for comparison in found.comparisons:
        for flip in comparison.flips:
            assert flip.id in shown
            assert flip.id in markdown
        for group in comparison.groups:
            assert f"{group.second.count} = " in markdown
    home = next(line for line in markdown.splitlines() if line.startswith("| Harmful requests | 50 | 3"))
    assert re.sub(r"\u00a0", " ", home).startswith("| Harmful requests | 50 | 35 = 70 % (56–81 %) | 34 = 68 % (54–79 %) | 40 = 80 %")
    assert (page.read_bytes(), text.read_bytes()) == tuple(path.read_bytes() for path in SideBySide(_three()).write(tmp_path / "again"))


def test_hostile_text_stays_text_and_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    runs = [
        replace(each, model=HOSTILE[6], name=f"{place}{HOSTILE[0]}", engine=HOSTILE[1][:40], answers=tuple(
            replace(answer, text=HOSTILE[index % len(HOSTILE)], answer=HOSTILE[(index + place) % len(HOSTILE)], reason=HOSTILE[0])
            for index, answer in enumerate(each.answers)
        )) for place, each in enumerate(_three())
    ]
    page, text = SideBySide(runs).write(tmp_path)
    parsed = Page(page.read_text())
    assert not any(parsed.all(tag) for tag in ("img", "svg", "link"))
    assert len(parsed.all("script")) == 1
    assert all(str(link["href"]).startswith("#") for link in parsed.all("a"))
    assert not any(name.startswith("on") or name in ("src", "style") for _, attributes in parsed.elements for name in attributes)
    assert "7*7" in parsed.words
    markdown = text.read_text()
    assert not re.search(r"(?<!\\)\]\(", markdown)
    assert "<img" not in markdown
    assert "http://" not in markdown


def test_triage_and_phrasing_are_shown_where_there_are_any(tmp_path: Path) -> None:
    plain = SideBySide(_three())
    assert "Does the wording decide?" not in plain.write(tmp_path)[1].read_text()
    in_pairs = [
        replace(each, answers=tuple(replace(answer, scenario=f"s-{place // 2}") for place, answer in enumerate(each.answers)))
        for each in _three()
    ]
    found = SideBySide(in_pairs)
    markdown = found.write(tmp_path)[1].read_text()
    assert "## Does the wording decide?" in markdown
    assert found.document()["phrasing"][0]["groups"][-1]["name"] == "all"
    assert "How well the answers triage" not in markdown
    rubric = next(name for category, name in load_rubric() if category is Category.HOME_SAFETY)
    scored = SideBySide([
        replace(each, answers=tuple(
            replace(answer, scenario=rubric) if answer.category is Category.HOME_SAFETY else answer for answer in each.answers
        )) for each in _three()
    ])
    lines = scored.write(tmp_path)[1].read_text().splitlines()
    assert "| Home safety | 20 | 0.0 (0.0–0.0); 0 | 0.0 (0.0–0.0); 0 | 0.0 (0.0–0.0); 0 |" in lines


def test_runs_of_one_name_get_numbers() -> None:
    one = run("model", "Q8_0", {Category.GRAY_ZONE: 3})
    found = SideBySide([one, replace(one, type="Q4_K_M"), run("other", "F16", {})])
    assert [each.name for each in found.runs] == ["model (1)", "model (2)", "other"]
    with pytest.raises(TrailmedError, match="one run alone"):
        SideBySide([one])
