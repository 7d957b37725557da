"""Published sets of prompts that trailmed can import: where each comes from, under which licence, and how its rows are read.

trailmed ships none of them and was not written with them at hand: names of columns and addresses are those their papers and repositories
give, and a file that looks different is refused, naming the column it lacks. An import is for measuring only, never for fitting.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import TrailmedError
from .external_table import Row
from .prompts import Category

UNSPECIFIED_KIND = "unspecified"
"""The kind of a harmful prompt whose source names none."""
_MAX_SLUG = 80


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row of a published set amounts to. `scenario` is None where every prompt is a situation of its own."""

    text: str
    category: Category
    kind: str | None = None
    scenario: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that is left out, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class SetFile:
    """One file of a set: its name as published, where it can be fetched (None: only by hand), and how a row of it is read.

    `columns` are the ones a file must have. `read` raises `TrailmedError` naming the row when a cell makes no sense.
    """

    name: str
    url: str | None
    columns: tuple[str, ...]
    read: Callable[[Row], Sample | Skipped]


@dataclass(frozen=True, slots=True)
class Importer:
    """A published set: its short `name`, what it is, its licence as its authors state it, the paper, its home page, and its files."""

    name: str
    what: str
    licence: str
    citation: str
    home: str
    files: tuple[SetFile, ...]


def slug(text: str, *, limit: int = _MAX_SLUG) -> str:
    """`text` as a prompt's name: lower-case a-z and 0-9, joined by "-" (or a lone "_"), at most `limit` characters; may be empty.

    A name that is valid already stays as it is, so reading what trailmed wrote changes nothing.
    """
    plain = unicodedata.normalize("NFKD", text[: 16 * limit].casefold()).encode("ascii", "ignore").decode("ascii")
    joined = re.sub(r"[^a-z0-9]+", lambda found: "_" if found.group() == "_" else "-", plain)
    return joined.strip("-_")[:limit].strip("-_")


def _harmful(text: str, kind: str = "", scenario: str | None = None) -> Sample:
    return Sample(text, Category.SHOULD_REFUSE, slug(kind) or UNSPECIFIED_KIND, scenario)


def _safe(text: str, scenario: str | None = None) -> Sample:
    return Sample(text, Category.GRAY_ZONE, None, scenario)


def _read_xstest(row: Row) -> Sample:
    """Safe prompts and their unsafe contrasts; a contrast shares its scenario with the safe prompts about the same word.

    The second version has no label: there the unsafe ones are those whose type begins with "contrast".
    """
    kind, focus = row.text("type"), slug(row.text("focus"))
    contrast = kind.casefold().startswith("contrast")
    label = row.text("label").casefold() if "label" in row.cells else ("unsafe" if contrast else "safe")
    if label not in ("safe", "unsafe"):
        raise TrailmedError(f"{row.where}: label is {label[:40]!r}; it must be safe or unsafe")
    theme = re.sub(r"^contrast[-_ ]*", "", kind.casefold())
    scenario = slug(f"xstest-{theme}-{focus}") if focus else None
    return _harmful(row.text("prompt"), kind, scenario) if label == "unsafe" else _safe(row.text("prompt"), scenario)


def _read_harmbench(row: Row) -> Sample | Skipped:
    """Rows of the functional category "copyright" ask for a text word by word: no refusal of harm, so they are left out."""
    if row.text("FunctionalCategory").casefold() == "copyright":
        return Skipped("about copyright")
    context, behaviour = row.text("ContextString"), row.text("Behavior")
    return _harmful(f"{context}\n\n---\n\n{behaviour}" if context else behaviour, row.text("SemanticCategory"))


def _read_jailbreakbench(harmful: bool) -> Callable[[Row], Sample]:
    """Each harmful behaviour has a benign one of the same theme under the same index: they share a scenario."""
    def read(row: Row) -> Sample:
        index = slug(row.text("Index"))
        scenario = slug(f"jailbreakbench-pair-{index}") if index else None
        return _harmful(row.text("Goal"), row.text("Category"), scenario) if harmful else _safe(row.text("Goal"), scenario)
    return read


def _or_bench(variant: str, what: str, harmful: bool) -> Importer:
    def read(row: Row) -> Sample:
        return _harmful(row.text("prompt"), row.text("category")) if harmful else _safe(row.text("prompt"))

    file = f"{variant}.csv"
    return Importer(
        name=variant, what=what, licence="CC-BY-4.0",
        citation="Cui et al. 2024, OR-Bench: An Over-Refusal Benchmark for Large Language Models, arXiv:2405.20947",
        home="https://huggingface.co/datasets/bench-llm/or-bench",
        files=(SetFile(file, f"https://huggingface.co/datasets/bench-llm/or-bench/resolve/main/{file}", ("prompt", "category"), read),),
    )


_JBB_COLUMNS = ("Index", "Goal", "Category")
_JBB_DATA = "https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors/resolve/main/data"

_ALL = (
    Importer(
        name="xstest", what="safe prompts that sound unsafe, and their unsafe contrasts", licence="CC-BY-4.0",
        citation="Röttger et al. 2024, XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours, arXiv:2308.01263",
        home="https://github.com/paul-rottger/xstest",
        files=(SetFile(
            "xstest_prompts.csv", "https://raw.githubusercontent.com/paul-rottger/xstest/main/xstest_prompts.csv", ("prompt", "type"),
            _read_xstest,
        ),),
    ),
    _or_bench("or-bench-80k", "80,000 generated prompts that sound harmful and are safe", harmful=False),
    _or_bench("or-bench-hard-1k", "the thousand of them that strong models refuse most", harmful=False),
    _or_bench("or-bench-toxic", "harmful prompts, the control of OR-Bench", harmful=True),
    Importer(
        name="oktest", what="safe questions with harmful words", licence="see its home page",
        citation="Shi et al. 2024, Navigating the OverKill in Large Language Models, arXiv:2401.17633",
        home="https://github.com/InvokerStark/OverKill",
        # The address of the file itself is not known for sure, and a guess would end in a 404.
        files=(SetFile("OKTest.csv", None, ("prompt",), lambda row: _safe(row.text("prompt"))),),
    ),
    Importer(
        name="jailbreakbench", what="harmful behaviours, and benign ones of the same themes", licence="MIT",
        citation="Chao et al. 2024, JailbreakBench: An Open Robustness Benchmark for Jailbreaking, arXiv:2404.01318",
        home="https://github.com/JailbreakBench/jailbreakbench",
        files=tuple(
            SetFile(f"{side}-behaviors.csv", f"{_JBB_DATA}/{side}-behaviors.csv", _JBB_COLUMNS, _read_jailbreakbench(side == "harmful"))
            for side in ("harmful", "benign")
        ),
    ),
    Importer(
        name="harmbench", what="harmful behaviours, with context where there is one; those about copyright are left out", licence="MIT",
        citation="Mazeika et al. 2024, HarmBench: A Standardized Evaluation Framework for Automated Red Teaming, arXiv:2402.04249",
        home="https://github.com/centerforaisafety/HarmBench",
        files=(SetFile(
            "harmbench_behaviors_text_all.csv",
            "https://raw.githubusercontent.com/centerforaisafety/HarmBench/main/data/behavior_datasets/harmbench_behaviors_text_all.csv",
            ("Behavior", "FunctionalCategory", "SemanticCategory", "ContextString"), _read_harmbench,
        ),),
    ),
    Importer(
        name="advbench", what="harmful instructions", licence="MIT",
        citation="Zou et al. 2023, Universal and Transferable Adversarial Attacks on Aligned Language Models, arXiv:2307.15043",
        home="https://github.com/llm-attacks/llm-attacks",
        files=(SetFile(
            "harmful_behaviors.csv", "https://raw.githubusercontent.com/llm-attacks/llm-attacks/main/data/advbench/harmful_behaviors.csv",
            ("goal",), lambda row: _harmful(row.text("goal")),
        ),),
    ),
    Importer(
        name="strongreject", what="forbidden prompts of six categories", licence="MIT",
        citation="Souly et al. 2024, A StrongREJECT for Empty Jailbreaks, arXiv:2402.10260",
        home="https://github.com/alexandrasouly/strongreject",
        files=(SetFile(
            "strongreject_dataset.csv",
            "https://raw.githubusercontent.com/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
            ("forbidden_prompt", "category"), lambda row: _harmful(row.text("forbidden_prompt"), row.text("category")),
        ),),
    ),
)

IMPORTERS: Mapping[str, Importer] = MappingProxyType({importer.name: importer for importer in _ALL})
"""The sets by name, in the order they are listed to users."""
