"""The reports: true to results.json, whole, safe with hostile text, and asking the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from html_page import HOSTILE, Page
from made_up_runs import REMOVED, SAID, four_runs, made_up_results, with_verdicts

from trailmed.errors import TrailmedError
from trailmed.eval import report
from trailmed.eval.benchmark import KL
from trailmed.eval.chart import charts
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category
from trailmed.eval.report import render_html, render_markdown, write_reports
from trailmed.eval.results import Results
from trailmed.eval.runs import EvalRun


def _hostile() -> Results:
    """Every text a stranger can choose is hostile, in flips of all four comparisons."""
    def poisoned(run: EvalRun, position: int) -> EvalRun:
        answers = tuple(
            replace(answer, text=HOSTILE[index % len(HOSTILE)], answer=HOSTILE[(index + position) % len(HOSTILE)], reason=HOSTILE[0])
            for index, answer in enumerate(run.answers)
        )
        return replace(run, answers=answers, name=HOSTILE[position % 2], model=HOSTILE[6])

    runs = four_runs()
    runs["edited_quantized"] = with_verdicts(runs["edited_quantized"], {f"should-refuse-{n:03d}": Verdict.COMPLIANCE for n in range(20)})
    poison = dict.fromkeys(HOSTILE, HOSTILE[0]) | {"list": list(HOSTILE), "deep": {HOSTILE[0]: HOSTILE[1]}}
    return made_up_results(
        **{name: poisoned(run, position) for position, (name, run) in enumerate(runs.items())}, split=HOSTILE[0], model=poison, edit=poison,
        machine=poison, command=HOSTILE,
    )


def test_page_says_what_the_results_say() -> None:
    said = _in_order(render_html(made_up_results()))
    for words in (
        "✓ PASS All 14 checks passed: benign prompts refused at Q8_0: 3 of 130, the base 24 of 130",
        "24 → 3 of 130 refused", "34 → 40 of 50 refused", "trailmed is a toolkit, not a doctor", "mean 0.0100 nats",
        "trailmed run qwen2.5-coder-0.5b-instruct --out run --seed 7", "6 min 21 s", "5.10 GB", "10 min 27 s", "494,032,768",
        "learning_rate", "e" * 64,
    ):
        assert words in said, words
    assert "FAIL" not in said


def _in_order(text: str) -> str:
    """The page's visible words in reading order."""
    pieces: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            pieces.append(data)

    Reader(convert_charrefs=True).feed(text)
    return " ".join(" ".join(pieces).split())


def test_rows_and_bars_hold_the_same_figures() -> None:
    results = made_up_results()
    said = _in_order(render_html(results))
    # Wilson intervals of 0/20, 5/20, 2/30 and 40/50, in percent: 0–16, 11–47, 2–21, 67–89
    assert "Emergency medicine 20 5 25 % (11–47 %) 0 0 % (0–16 %) 0.062 5 25 % (11–47 %) 0 0 % (0–16 %) 0.062" in said
    assert "All benign prompts 130 23 18 % (12–25 %) 2 2 % (0–5 %) < 0.001" in said
    chart = next(chart for chart in charts(results) if chart.group == "gray_zone")
    assert [bar.count for bar in chart.bars] == ["5/30", "6/30", "2/30", "3/30"]
    base_full = chart.bars[0]
    axis = chart.ticks[-1][0] - chart.ticks[0][0]
    assert (base_full.end - chart.left) / axis == pytest.approx(5 / 30, abs=1e-3)
    assert base_full.low < base_full.end < base_full.high
    assert "Edited Q8_0 3 of 30, 10 %, interval 3–26 %" in chart.description.replace("\u00a0", " ")
    svg = [attributes for attributes in Page(render_html(results)).all("svg") if attributes["role"] == "img"]
    assert [attributes["aria-label"] for attributes in svg] == [chart.description for chart in charts(results)]
    assert len(svg) == 9


def test_a_failure_is_named_on_top() -> None:
    runs = four_runs()
    runs["edited_full"] = with_verdicts(runs["edited_full"], {f"should-refuse-{n:03d}": Verdict.COMPLIANCE for n in range(9)})
    results = made_up_results(**runs)
    reason = "Failed: harmful requests refused at F16: 31 of 50, the base 35 of 50 (and 1 more of 14 checks)."
    assert f"✗ FAIL {reason}" in _in_order(render_html(results))
    assert "PASS" not in _in_order(render_html(results))
    assert render_markdown(results).startswith("# FAIL:")
    assert reason in render_markdown(results)


def test_every_flip_is_there_in_both_directions() -> None:
    results = made_up_results()
    page = Page(render_html(results))
    flips = [found for found in page.all("details") if found.get("class") == "flip"]
    listed = [(found["data-list"], found["data-category"], found["data-direction"]) for found in flips]
    comparisons = results.comparisons
    by_key = {
        "edit-full": comparisons.edit_full, "edit-quantized": comparisons.edit_quantized, "base": comparisons.quantization_base,
        "edited": comparisons.quantization_edited,
    }
    assert listed == [(key, flip.category, flip.direction) for key, found in by_key.items() for flip in found.flips]
    assert {direction for _, _, direction in listed} == {"lost", "gained"}
    tags = [found["class"] for found in page.all("span") if (found.get("class") or "").startswith("tag")]
    unwelcome = {("should_refuse", "lost"), ("gray_zone", "gained")}
    assert tags == ["tag worse" if (category, direction) in unwelcome else "tag better" for _, category, direction in listed]
    assert set(tags) == {"tag worse", "tag better"}
    text = render_markdown(results)
    for comparison in by_key.values():
        for flip in comparison.flips:
            assert f"{flip.id}): {flip.text}" in text
    offered = {option["value"] for option in page.all("option")}
    assert offered >= {"", "lost", "gained", *by_key, *(flip.category for found in by_key.values() for flip in found.flips)}


def test_hostile_text_stays_text() -> None:
    results = _hostile()
    text = render_html(results)
    page = Page(text)
    assert {name for name, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "a", "header", "h1", "h2", "h3", "h4", "p", "section", "div", "span", "strong",
        "nav", "ul", "ol", "li", "main", "small", "figure", "figcaption", "svg", "line", "text", "rect", "path", "table", "thead", "tbody",
        "tr", "th", "td", "details", "summary", "dl", "dt", "dd", "form", "label", "input", "select", "option", "button", "output",
        "blockquote", "pre", "code", "footer", "script",
    }
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert [found["href"] for found in page.all("a") if not (found["href"] or "").startswith("#")] == []
    assert len(page.all("script")) == 1
    assert len(page.all("svg")) == 9
    for hostile in HOSTILE[:5]:
        assert hostile in page.words  # shown, but as words
    assert "49" not in re.findall(r"\b49\b", page.words)


def test_page_asks_the_network_for_nothing() -> None:
    for results in (made_up_results(), _hostile()):
        page = Page(render_html(results))
        for _, attributes in page.elements:
            assert not attributes.keys() & {"src", "srcset", "action", "data", "poster", "background", "ping", "xlink:href", "formaction"}
        style, script = "".join(page.text["style"]), "".join(page.text["script"])
        assert not re.search(r"url\(|@import|https?:|//", style)
        assert not re.search(r"https?:|fetch|XMLHttp|import|innerHTML|eval|document\.write", script)
        policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None
        hashes = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in (style, script)]
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}';")
        assert "unsafe" not in policy


def test_markdown_lets_nothing_through() -> None:
    text = render_markdown(_hostile())
    assert not re.search(r"<(?!br)[a-zA-Z/!]", text)
    assert not re.search(r"(?<!\\)\]\(|://|www\.|(?<!\\)`", text)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_answers_to_harmful_requests_are_shown_cut_and_marked() -> None:
    edited = with_verdicts(four_runs()["edited_full"], {"should-refuse-000": Verdict.COMPLIANCE})
    results = made_up_results(edited_full=edited)
    said = _in_order(render_html(results))
    assert f"{SAID[Verdict.COMPLIANCE][:80]}…" in said
    comparisons = results.comparisons
    harmful = [
        flip
        for found in (comparisons.edit_full, comparisons.edit_quantized, comparisons.quantization_base, comparisons.quantization_edited)
        for flip in found.flips if flip.category is Category.SHOULD_REFUSE
    ]
    # one side of each such flip is a refusal, shown whole; the other is cut
    assert said.count("Cut at 80 characters") == len(harmful) > 0
    assert render_markdown(results).count("… (cut)") == len(harmful)


def test_a_run_without_flips_needs_no_script() -> None:
    base = {name: four_runs()["base_full"] for name in ("base_full", "edited_full")}
    runs = base | {name.replace("full", "quantized"): replace(run, type="Q8_0") for name, run in base.items()}
    page = Page(render_html(made_up_results(**runs)))
    assert page.all("script") == []
    assert page.all("form") == []
    assert page.words.count("None.") == 4


def test_a_small_prompt_set_and_kept_categories() -> None:
    runs = {
        name: replace(run, answers=tuple(answer for answer in run.answers if answer.category in (Category.GRAY_ZONE, Category.HOME_SAFETY)))
        for name, run in four_runs().items()
    }
    results = made_up_results(
        **runs, kl=KL(0.0, 0.0, {}), removed=[Category.GRAY_ZONE], stages=(), command=(), machine=None, model={}, edit={},
    )
    said = _in_order(render_html(results))
    assert "Kept as they were 0 → 0 of 20 refused" in said
    assert said.count("None were measured.") == 2
    assert "not measured" in said
    assert "Time and memory" not in said
    assert "First-token KL on the safe controls" not in said
    assert "kept as they were: other benign prompts | 20 | 0 | 0 | 0 | 0 |" in render_markdown(results)
    assert "Kept as they were" not in _in_order(render_html(made_up_results(removed=REMOVED)))


def test_page_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(render_html(made_up_results()).encode()) < 150_000
    whole = len(Page(render_html(made_up_results())).all("details"))
    monkeypatch.setattr(report, "LISTED_FLIPS", 3)
    text = render_html(made_up_results())
    found = [attributes for attributes in Page(text).all("details") if attributes.get("class") == "flip"]
    assert len(found) == 3 + 3 + 2 + 1 < whole
    assert "The other 24 are in results.json." in text
    assert "The other 24 are in results.json." in render_markdown(made_up_results())


def test_reports_are_written_from_the_file_alone_and_alike(tmp_path: Path) -> None:
    made_up_results().save(tmp_path / "results.json")
    page, text = write_reports(tmp_path / "results.json")
    assert (page, text) == (tmp_path / "report.html", tmp_path / "report.md")
    other, _ = write_reports(tmp_path / "results.json", tmp_path / "elsewhere")
    assert page.read_bytes() == other.read_bytes() == render_html(made_up_results()).encode()
    assert text.read_text() == render_markdown(made_up_results())
    with pytest.raises(TrailmedError, match="no such file"):
        write_reports(tmp_path / "none.json")
