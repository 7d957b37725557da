"""compare.html and compare.md: several runs side by side, and every flip against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import write_text_atomically
from .compare import CONFIDENCE, FLIP_MARGIN, Comparison, compare
from .phrasing import PhrasingGroup, PhrasingSensitivity, phrasing_sensitivity
from .prompts import Category
from .rendering import render_page, render_text
from .report import FlipList
from .runs import EvalRun
from .triage import Triage, TriageGroup, triage

HTML_NAME = "compare.html"
MARKDOWN_NAME = "compare.md"


class SideBySide:
    """Everything `trailmed compare` shows of `runs`, the first of which the others are held against.

    Runs of the same name get numbers. Raises `TrailmedError` as `compare` does.
    """

    def __init__(self, runs: Sequence[EvalRun], *, margin: float = FLIP_MARGIN) -> None:
        self.runs = _told_apart(runs)
        self.comparisons: list[Comparison] = compare(*self.runs, margin=margin)
        self.phrasing: list[PhrasingSensitivity] = [phrasing_sensitivity(run) for run in self.runs]
        self.triage: list[Triage] = [triage(run) for run in self.runs]
        self.margin = margin

    def document(self) -> dict[str, Any]:
        """All of it as plain JSON: comparisons with every flip, triage scores and phrasing sensitivity by group."""
        return {
            "comparisons": [asdict(each) for each in self.comparisons],
            "triage": [{"run": each.run, "groups": [asdict(group) for group in each.groups]} for each in self.triage],
            "phrasing": [
                {"run": each.run, "groups": [asdict(group) for group in each.groups],
                 "depends": [scenario.name for scenario in each.scenarios if scenario.depends]} for each in self.phrasing
            ],
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write compare.html and compare.md into `folder`; returns their paths. Raises `TrailmedError` when it cannot be written."""
        page, text = folder / HTML_NAME, folder / MARKDOWN_NAME
        write_text_atomically(page, render_page("compare.html.j2", self._context()))
        write_text_atomically(text, render_text("compare.md.j2", self._context()))
        return page, text

    def _context(self) -> dict[str, Any]:
        first = self.comparisons[0]
        decoded: list[tuple[str, ...]] = [(), *(each.decoded for each in self.comparisons)]
        return {
            "runs": [
                {"name": run.name, "engine": run.engine, "model": run.model, "type": run.type, "model_sha256": run.model_sha256,
                 "prompts": len(run.answers), "decoded": differing} for run, differing in zip(self.runs, decoded, strict=True)
            ],
            "rows": [
                {"name": group.name, "n": group.n, "rates": [group.first, *(each.groups[place].second for each in self.comparisons)]}
                for place, group in enumerate(first.groups)
            ],
            "comparisons": self.comparisons, "margin": self.margin, "confidence": CONFIDENCE,
            "triaged": _by_group([each.groups for each in self.triage]), "phrasing": _by_group([each.groups for each in self.phrasing]),
            "flip_lists": [
                FlipList(f"pair-{place}", f"{each.first} → {each.second}", each.first, each.second, each)
                for place, each in enumerate(self.comparisons)
            ],
            "categories": [str(category) for category in Category if first.group(category) is not None],
            "max_tokens": self.runs[0].settings.get("max_tokens", "an unknown number of"), "version": __version__,
        }


def _told_apart(runs: Sequence[EvalRun]) -> list[EvalRun]:
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[: place + 1].count(run.name)})") if names.count(run.name) > 1 else run
        for place, run in enumerate(runs)
    ]


def _by_group(groups: Sequence[Sequence[TriageGroup | PhrasingGroup]]) -> list[tuple[TriageGroup | PhrasingGroup, ...]]:
    """One row a group, one cell a run: all runs have the same prompts, so the same groups."""
    return list(zip(*groups, strict=True))
