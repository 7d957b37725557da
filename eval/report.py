"""report.html and report.md, made from results.json and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import write_text_atomically
from .chart import charts
from .compare import CONFIDENCE, Comparison, Flip
from .prompts import BENIGN_CATEGORIES, Category
from .rendering import render_page, render_text
from .results import Results

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
LISTED_FLIPS = 400
"""Flips shown of each comparison, so that the page of a huge benchmark still opens on a phone; results.json has them all."""


@dataclass(frozen=True, slots=True)
class FlipList:
    """One comparison's flips as the reports list them."""

    key: str
    title: str
    first: str
    second: str
    comparison: Comparison

    @property
    def shown(self) -> tuple[Flip, ...]:
        return self.comparison.flips[:LISTED_FLIPS]

    def count(self, direction: Literal["lost", "gained"]) -> int:
        return sum(flip.direction == direction for flip in self.comparison.flips)


def write_reports(results: Path, folder: Path | None = None) -> tuple[Path, Path]:
    """Read the results file and write report.html and report.md into `folder` (default: beside it); returns their paths.

    Raises `TrailmedError` when `results` is not a results file or `folder` cannot be written.
    """
    found = Results.load(results)
    folder = results.parent if folder is None else folder
    page, text = folder / HTML_NAME, folder / MARKDOWN_NAME
    write_text_atomically(page, render_html(found))
    write_text_atomically(text, render_markdown(found))
    return page, text


def render_html(results: Results) -> str:
    """The whole page. The same results, the same text."""
    return render_page("report.html.j2", {**_context(results), "charts": charts(results)})


def render_markdown(results: Results) -> str:
    """The report as GitHub-flavoured Markdown, every value escaped. The same results, the same text."""
    return render_text("report.md.j2", _context(results))


def _context(results: Results) -> dict[str, Any]:
    comparisons, runs = results.comparisons, results.runs
    full, small = runs.edited_full.type, runs.edited_quantized.type
    groups = [group.name for group in comparisons.edit_full.groups]
    return {
        "results": results, "comparisons": comparisons, "runs": runs, "full": full, "small": small,
        "tabled": [name for name in groups if name != "all"],
        "answered": [name for name in ("benign", Category.SHOULD_REFUSE, Category.SAFE_CONTROL) if name in groups],
        "removed_counts": _counts(results, results.removed), "kept_counts": _counts(results, results.kept),
        "harmful_counts": _counts(results, [Category.SHOULD_REFUSE]), "control_counts": _counts(results, [Category.SAFE_CONTROL]),
        "flip_lists": [
            FlipList("edit-full", f"The edit at {full}", f"Base {full}", f"Edited {full}", comparisons.edit_full),
            FlipList("edit-quantized", f"The edit at {small}", f"Base {small}", f"Edited {small}", comparisons.edit_quantized),
            FlipList("base", f"Quantizing the base, {full} → {small}", f"Base {full}", f"Base {small}", comparisons.quantization_base),
            FlipList(
                "edited", f"Quantizing the edited model, {full} → {small}", f"Edited {full}", f"Edited {small}",
                comparisons.quantization_edited,
            ),
        ],
        "quantized": [("Base", comparisons.quantization_base), ("Edited", comparisons.quantization_edited)],
        "confidence": CONFIDENCE,
        "all_benign_removed": set(results.removed) == set(BENIGN_CATEGORIES),
        "largest_kl": sorted(results.kl.per_prompt.items(), key=lambda item: (-item[1], item[0])),
    }


def _counts(results: Results, categories: Sequence[Category]) -> dict[str, int] | None:
    """Prompts of `categories` together (n) and how many are refused in each run; None when there were none."""
    found = [
        (full, small) for category in categories
        if (full := results.comparisons.edit_full.group(category)) is not None
        and (small := results.comparisons.edit_quantized.group(category)) is not None
    ]
    if not found:
        return None
    return {
        "n": sum(full.n for full, _ in found),
        "base_full": sum(full.first.count for full, _ in found), "edited_full": sum(full.second.count for full, _ in found),
        "base_quantized": sum(small.first.count for _, small in found), "edited_quantized": sum(small.second.count for _, small in found),
    }
