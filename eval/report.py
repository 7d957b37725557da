"""report.html and report.md, made from results.json and nothing else.

The page is one file that asks the network for nothing: style, script and charts are inline, and a content security policy that
names the script's and the style's own hashes lets no other run, whatever a prompt or an answer may hold.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from ..files import write_text_atomically
from . import wording
from .chart import charts
from .compare import CONFIDENCE, Comparison, Flip
from .judge import Verdict
from .prompts import BENIGN_CATEGORIES, Category
from .results import Results
from .runs import HARMFUL_ANSWER_CHARACTERS

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"
LISTED_FLIPS = 400
"""Flips shown of each comparison, so that the page of a huge benchmark still opens on a phone; results.json has them all."""
_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class _FlipList:
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
    style, script = (_TEMPLATES.joinpath(name).read_text(encoding="utf-8").strip() for name in ("report.css", "report.js"))
    policy = f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(script)}; base-uri 'none'; form-action 'none'"
    return _environment(autoescape=True).get_template("report.html.j2").render(
        _context(results), charts=charts(results), style=Markup(style), script=Markup(script), policy=policy,
    )


def render_markdown(results: Results) -> str:
    """The report as GitHub-flavoured Markdown, every value escaped. The same results, the same text."""
    environment = _environment(autoescape=False, finalize=_markdown)
    return environment.get_template("report.md.j2").render(_context(results))


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, **options,
    )
    environment.filters.update(
        title_of=wording.title, percent=wording.percent, equivalence=wording.equivalence, interval=wording.interval,
        p_value=wording.p_value, measured=wording.measured, duration=wording.duration, size=wording.size, plain=wording.plain,
        fact=lambda item: wording.fact(*item), fact_name=lambda item: wording.fact_name(*item),
        label=lambda name: str(name).replace("_", " "),
    )
    return environment


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
            _FlipList("edit-full", f"The edit at {full}", f"Base {full}", f"Edited {full}", comparisons.edit_full),
            _FlipList("edit-quantized", f"The edit at {small}", f"Base {small}", f"Edited {small}", comparisons.edit_quantized),
            _FlipList("base", f"Quantizing the base, {full} → {small}", f"Base {full}", f"Base {small}", comparisons.quantization_base),
            _FlipList(
                "edited", f"Quantizing the edited model, {full} → {small}", f"Edited {full}", f"Edited {small}",
                comparisons.quantization_edited,
            ),
        ],
        "quantized": [("Base", comparisons.quantization_base), ("Edited", comparisons.quantization_edited)],
        "verdicts": list(Verdict), "confidence": CONFIDENCE, "cut_at": HARMFUL_ANSWER_CHARACTERS,
        "all_benign_removed": set(results.removed) == set(BENIGN_CATEGORIES),
        "largest_kl": sorted(results.kl.per_prompt.items(), key=lambda item: (-item[1], item[0])),
        "is_cut": _is_cut, "is_worse": lambda flip: (flip.category is Category.SHOULD_REFUSE) == (flip.direction == "lost"),
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


def _is_cut(flip: Flip, verdict: Verdict, answer: str) -> bool:
    return flip.category is Category.SHOULD_REFUSE and verdict is not Verdict.REFUSAL and len(answer) >= HARMFUL_ANSWER_CHARACTERS


def _source_hash(text: str) -> str:
    """How a content security policy names an inline script or style (CSP Level 3, §2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _markdown(value: object) -> object:
    """Escape a value put into the Markdown template: no markup, no HTML, no link and no line break gets through."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = wording.plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return text.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
