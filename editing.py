"""`directions` and `edit`: the stages from a model to its edit, each done once; `run` goes on from there."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .abliterate.activations import Activations
from .abliterate.directions import Directions, cohens_d, mean_difference
from .abliterate.edit import Edit
from .abliterate.observed import Observed, Role, masks_by_role
from .device.system import physical_cores
from .errors import TrailmedError
from .eval.prompts import Prompt, Split, load_benchmark, load_prompts, load_retain, prompts_hash
from .files import sha256_of_file
from .fitting import (
    capture_activations,
    find_directions,
    fit_edit,
    fit_prompts,
    observe,
    origin_of,
    read_observed,
    sampled_scenarios,
    unasked,
)
from .models.load import LoadedModel, load_model
from .models.precision import compute_dtype
from .models.source import resolve_model
from .settings import EditSettings, Method, settings_document
from .stages import Stages

RETAIN_ASKED = 576
"""Prompts of the retain set, at most, that the methods learn from which need the base's answers to them."""

Stage = tuple[str, list[Path] | Callable[[], list[Path]], Callable[[], object]]
"""Name, outputs and work of a stage, as `Stages.run` takes them."""


class EditJob:
    """The stages that make one edit, writing into `folder`; the module is loaded when the first of them needs it."""

    def __init__(
        self, source: Path, folder: Path, settings: EditSettings, *, threads: int, prompts: Path | None, retain: Path | None,
        progress: bool,
    ) -> None:
        if threads < 1:
            raise TrailmedError(f"threads is {threads}; it must be at least 1")
        self.source, self.settings, self.threads, self.progress = source, settings, threads, progress
        self.benchmark = load_benchmark() if prompts is None else load_prompts(prompts)
        self.retain = [
            prompt.model_copy(update={"split": Split.FIT}) for prompt in (load_retain() if retain is None else load_prompts(retain))
        ]
        if settings.method is not Method.CONDITIONAL:
            self.retain = sampled_scenarios(self.retain, RETAIN_ASKED)
        self.fit, self.validation = fit_prompts(self.benchmark, self.retain)
        # Directions are means over the benchmark's own fit split, which comes first in `fit`; the retain set is for what must stay.
        self.shown = [prompt for prompt in self.benchmark if prompt.split is Split.FIT]
        self.answers = folder / "base-answers.json"
        self.activations = folder / "activations.safetensors"
        self.directions = folder / "directions.safetensors"
        self.edit = folder / "edit.safetensors"

    def manifest(self) -> dict[str, Any]:
        """What identifies the job: a folder that holds another one is not touched."""
        return {
            "model_sha256": sha256_of_file(self.source), "prompts_sha256": prompts_hash(self.benchmark),
            "retain_sha256": prompts_hash(self.retain), "edit": settings_document(self.settings), "threads": self.threads,
            "dtype": str(compute_dtype()).removeprefix("torch."),
        }

    def direction_stages(self) -> list[Stage]:
        """Observe the base, capture activations, find directions."""
        return [
            ("base answers", [self.answers], self._observe),
            ("activations", [self.activations], self._capture),
            ("directions", [self.directions], self._find),
        ]

    def stages(self) -> list[Stage]:
        """All of it, up to the edit."""
        return [*self.direction_stages(), (f"edit by {self.settings.method}", [self.edit], self._fit)]

    def observed(self) -> tuple[list[Observed], list[Observed]]:
        """What the base did with the fit (and retain) prompts, `shown` first, and with the validation prompts."""
        asked = {each.id: each for each in read_observed(self.model, self._asked, self.answers)}
        shown = {each.id: each for each in unasked(self.model, [each for each in [*self.fit, *self.validation] if each.id not in asked])}
        fit, validation = ([asked.get(each.id) or shown[each.id] for each in prompts] for prompts in (self.fit, self.validation))
        return fit, validation

    @property
    def _asked(self) -> list[Prompt]:
        """The prompts the base is asked: all, but for `conditional`, to which the retain set shows what requests are, not what the base
        does with them; so the set may be large."""
        if self.settings.method is not Method.CONDITIONAL:
            return [*self.fit, *self.validation]
        retained = {prompt.id for prompt in self.retain}
        return [prompt for prompt in [*self.fit, *self.validation] if prompt.id not in retained]

    @cached_property
    def model(self) -> LoadedModel:
        """The base in PyTorch, in the precision this machine is fast in."""
        torch.set_num_threads(self.threads)
        return load_model(self.source, dtype=compute_dtype())

    def forget_model(self) -> None:
        """Give the module's memory back."""
        self.__dict__.pop("model", None)
        gc.collect()

    def _observe(self) -> None:
        observe(self.model, self._asked, self.answers, progress=self.progress)

    def _capture(self) -> None:
        capture_activations(self.model, self.shown, progress=self.progress).save(self.activations)

    def _find(self) -> None:
        find_directions(Activations.load(self.activations), self.observed()[0][: len(self.shown)], self.settings).save(self.directions)

    def _fit(self) -> None:
        fit, validation = self.observed()
        origin = origin_of(self.source, self.settings, [*self.benchmark, *self.retain])
        found = Directions.load(self.directions)
        fit_edit(
            self.model, found, fit, validation, origin, self.settings, crossed=fit[: len(self.shown)], progress=self.progress,
        ).save(self.edit)
        self.forget_model()


@dataclass(frozen=True, slots=True)
class FoundDirections:
    """What `directions` found: the file, how many fit prompts were refused and answered, and Cohen's d between them at each layer."""

    path: Path
    refused: int
    answered: int
    cohens_d: tuple[float, ...]


def directions(
    model: str, out: Path, settings: EditSettings = EditSettings(), *, threads: int | None = None, prompts: Path | None = None,
    retain: Path | None = None, progress: bool = True,
) -> FoundDirections:
    """Observe `model` on the fit prompts and write base-answers.json, activations and directions (safetensors) to the folder `out`.

    Finished stages are not done twice. Raises `TrailmedError` for bad input.
    """
    source = resolve_model(model, progress=progress)
    job = EditJob(source, out, settings, threads=threads or physical_cores(), prompts=prompts, retain=retain, progress=progress)
    plan = job.direction_stages()
    with Stages(out, {"format": "trailmed.directions", **job.manifest()}, total=len(plan), progress=progress) as stages:
        for stage in plan:
            stages.run(*stage)
        residual = Activations.load(job.activations).residual
        masks = masks_by_role(job.observed()[0][: len(job.shown)], settings.removed)
        refused, answered = residual[masks[Role.OVER_REFUSED]], residual[masks[Role.COMPLIED]]
        enough = min(len(refused), len(answered)) > 1
        separation = cohens_d(refused, answered, mean_difference(refused, answered)) if enough else torch.zeros(0)
    return FoundDirections(job.directions, len(refused), len(answered), tuple(separation.tolist()))


def edit(
    model: str, out: Path, settings: EditSettings = EditSettings(), *, threads: int | None = None, prompts: Path | None = None,
    retain: Path | None = None, progress: bool = True,
) -> Edit:
    """Make an edit of `model` and write it to the file `out`; an interrupted one goes on from `OUT.work`, which ends with it.

    Raises `TrailmedError` for bad input.
    """
    source = resolve_model(model, progress=progress)
    work = out.with_name(f"{out.name}.work")
    job = EditJob(source, work, settings, threads=threads or physical_cores(), prompts=prompts, retain=retain, progress=progress)
    plan = job.stages()
    with Stages(work, {"format": "trailmed.edit", **job.manifest()}, total=len(plan), progress=progress) as stages:
        try:
            for stage in plan:
                stages.run(*stage)
        except TrailmedError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        made = Edit.load(job.edit)
        made.save(out)
    shutil.rmtree(work, ignore_errors=True)
    return made
