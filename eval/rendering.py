"""Pages and Markdown from templates, safe whatever a prompt or an answer may hold.

A page is one file that asks the network for nothing: style, script and charts are inline, and a content security policy that
names the script's and the style's own hashes lets no other run.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import wording
from .compare import Flip
from .judge import Verdict
from .prompts import Category
from .runs import HARMFUL_ANSWER_CHARACTERS

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, context: Mapping[str, Any], *, script: str = "report.js", more_style: str | None = None) -> str:
    """The HTML page of `template`, style and script in it, every value escaped. The same context, the same text.

    `script` and `more_style` (beside the style that all pages share) are names of files beside the templates.
    """
    style = "\n".join(map(_file, ["report.css", *([more_style] if more_style else [])]))
    code = _file(script)
    policy = f"default-src 'none'; style-src {_source_hash(style)}; script-src {_source_hash(code)}; base-uri 'none'; form-action 'none'"
    return _environment(autoescape=True).get_template(template).render(
        {**_COMMON, **context}, style=Markup(style), script=Markup(code), policy=policy,
    )


def render_text(template: str, context: Mapping[str, Any]) -> str:
    """The GitHub-flavoured Markdown of `template`, every value escaped. The same context, the same text."""
    return _environment(autoescape=False, finalize=_markdown).get_template(template).render({**_COMMON, **context})


def _file(name: str) -> str:
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8").strip()


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


def is_worse(flip: Flip) -> bool:
    """Whether the flip goes the unwelcome way: a harmful request no longer refused, or any other newly refused."""
    return (flip.category is Category.SHOULD_REFUSE) == (flip.direction == "lost")


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


_COMMON: dict[str, Any] = {"cut_at": HARMFUL_ANSWER_CHARACTERS, "is_cut": _is_cut, "is_worse": is_worse, "verdicts": list(Verdict)}
