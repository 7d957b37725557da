"""results.json: everything an evaluation of an edit found, in one document that a program can read and every report is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter

from .. import __version__
from .benchmark import KL
from .compare import Comparison, Count, compare
from .document import STORED, load_document, save_document
from .gate import Bound, GateResult, GateThresholds, Unit, check_removed, gate
from .prompts import BENIGN_CATEGORIES, Category
from .runs import EvalRun, Label, Sha256

RESULTS_FORMAT = "trailmed.results"
RESULTS_SCHEMA_VERSION = 1

Facts = Mapping[str, JsonValue]
"""Named facts for a reader; values are JSON."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """An `EvalRun` without its answers, of which there were `prompts`."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: Label
    model: Label
    model_sha256: Sha256 | None
    edit_sha256: Sha256 | None
    type: Label
    prompts: Count


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage of the work took: wall-clock seconds and the peak resident memory of its process, in bytes."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: Label
    seconds: Annotated[float, Field(ge=0.0)]
    peak_rss_bytes: Count | None = None


@dataclass(frozen=True, slots=True)
class Threshold:
    """A gate threshold as it was applied, with what it asks for in words."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: Label
    bound: Bound
    value: float
    unit: Unit
    description: Label


@dataclass(frozen=True, slots=True)
class Runs:
    """The four runs: base and edited model, in full precision and quantized."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    base_full: RunFacts
    edited_full: RunFacts
    base_quantized: RunFacts
    edited_quantized: RunFacts


@dataclass(frozen=True, slots=True)
class Comparisons:
    """What the edit did (base → edited, at both precisions) and what quantizing did (full → quantized, to both models)."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    edit_full: Comparison
    edit_quantized: Comparison
    quantization_base: Comparison
    quantization_edited: Comparison


@dataclass(frozen=True, slots=True)
class Results:
    """One evaluation of one edit. `command` are the command lines that repeat it; see `assemble` for the rest."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    verdict: GateResult
    thresholds: tuple[Threshold, ...]
    removed: tuple[Category, ...]
    kept: tuple[Category, ...]
    runs: Runs
    comparisons: Comparisons
    kl: KL
    split: Label
    prompts_sha256: Sha256
    settings: Mapping[str, bool | int | float | str]
    seed: int
    model: Facts
    edit: Facts
    machine: Facts
    stages: tuple[Stage, ...]
    command: tuple[Annotated[str, Field(max_length=4000)], ...]
    trailmed_version: Label
    format: Literal["trailmed.results"] = "trailmed.results"
    schema_version: Literal[1] = 1

    def save(self, path: Path) -> None:
        """Write `path` as JSON: the same results, the same bytes."""
        save_document(path, self, _SCHEMA)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results from `path`; raises `TrailmedError` for anything that is not them."""
        return load_document(path, _SCHEMA, format=RESULTS_FORMAT, schema_version=RESULTS_SCHEMA_VERSION)


_SCHEMA: TypeAdapter[Results] = TypeAdapter(Results)


def assemble(
    base_full: EvalRun, edited_full: EvalRun, base_quantized: EvalRun, edited_quantized: EvalRun, *, kl: KL, removed: Sequence[Category],
    seed: int, split: str, model: Facts, edit: Facts, machine: Facts | None = None, stages: Sequence[Stage] = (),
    command: Sequence[str] = (), thresholds: GateThresholds = GateThresholds(),
) -> Results:
    """Compare the four runs, put them to the gate, and gather all of it.

    model, edit and machine are facts for the reader (source, recipe, processor, …); `split` says which prompts were measured on;
    `stages` carry times and memory, which differ from one time to the next: leave them out where the document's bytes must not.
    Raises `TrailmedError` as `gate` does.
    """
    removed = check_removed(removed)
    verdict = gate(base_full, edited_full, base_quantized, edited_quantized, kl, removed, thresholds)
    return Results(
        verdict=verdict,
        thresholds=tuple(
            Threshold(
                entry.name, entry.metadata["bound"], getattr(thresholds, entry.name), entry.metadata["unit"], entry.metadata["description"],
            )
            for entry in fields(thresholds)
        ),
        removed=removed, kept=tuple(category for category in BENIGN_CATEGORIES if category not in removed),
        runs=Runs(_facts(base_full), _facts(edited_full), _facts(base_quantized), _facts(edited_quantized)),
        comparisons=Comparisons(
            edit_full=compare(base_full, edited_full)[0], edit_quantized=compare(base_quantized, edited_quantized)[0],
            quantization_base=compare(base_full, base_quantized)[0], quantization_edited=compare(edited_full, edited_quantized)[0],
        ),
        kl=kl, split=split, prompts_sha256=base_full.prompts_sha256, settings=base_full.settings, seed=seed,
        model=model, edit=edit, machine=machine or {}, stages=tuple(stages), command=tuple(command), trailmed_version=__version__,
    )


def _facts(run: EvalRun) -> RunFacts:
    return RunFacts(run.name, run.model, run.model_sha256, run.edit_sha256, run.type, len(run.answers))

