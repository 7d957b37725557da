"""`study`: what an edit's behaviour depends on, measured on prompts it was not fitted to. Stages of one folder, each done once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from pydantic import TypeAdapter

from .abliterate.conditional import ConditionalFit, ConditionalSettings
from .abliterate.observed import evenly_spread
from .abliterate.retention import Retention, retention
from .abliterate.validation import telling
from .device.system import physical_cores
from .editing import EditJob
from .errors import TrailmedError
from .eval.prompts import Category
from .files import read_json, write_json_atomically
from .fitting import sampled_scenarios
from .models.source import resolve_model
from .settings import EditSettings, RetentionSettings
from .stages import Stages

_BENIGN_ASKED = 160
_STORED = TypeAdapter(Retention)


@dataclass(frozen=True, slots=True)
class RetentionStudy:
    """What retention is under each condition, by its name; the first is the edit as `run` makes it, before its line is drawn."""

    path: Path
    conditions: dict[str, Retention]


class _RetentionJob:
    def __init__(self, job: EditJob, folder: Path, settings: RetentionSettings) -> None:
        self._job, self._folder, self._settings = job, folder / "conditions", settings

    def conditions(self) -> dict[str, tuple[ConditionalSettings, float]]:
        """By name the fit's settings, and the share of the retain set; one thing at a time departs from the default."""
        default = ConditionalSettings()
        return {
            "default": (default, 1.0),
            **{f"retain-{share:g}": (default, share) for share in self._settings.shares if share != 1},
            **{f"ridge-{ridge:g}": (replace(default, ridge=ridge), 1.0) for ridge in self._settings.ridges if ridge != default.ridge},
            **{f"nats-{nats:g}": (replace(default, nats=nats), 1.0) for nats in self._settings.nats if nats != default.nats},
        }

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def measure(self, name: str) -> None:
        """Ask the benchmark's fit prompts under the condition's rows and write what was found."""
        settings, share = self.conditions()[name]
        retained = self._job.retain
        kept = {prompt.id for prompt in sampled_scenarios(retained, round(share * len(retained)))}
        kinds = {prompt.id: prompt.kind or "" for prompt in self._job.fit if prompt.category is Category.SHOULD_REFUSE}
        asked = telling(self._fit.prompts[: len(self._job.shown)], self._job.settings.removed)
        benign = evenly_spread([prompt for prompt in asked if not prompt.should_refuse], _BENIGN_ASKED)
        found = retention(
            self._fit, settings, [*benign, *(prompt for prompt in asked if prompt.should_refuse)], kinds,
            {prompt.id for prompt in retained} - kept,
        )
        self._folder.mkdir(exist_ok=True)
        write_json_atomically(self.path(name), asdict(found))

    @cached_property
    def _fit(self) -> ConditionalFit:
        layers = ConditionalSettings().layers(len(self._job.model.module.model.layers))
        return ConditionalFit(self._job.model, self._job.observed()[0], self._job.settings.removed, layers, progress=self._job.progress)


def study_retention(
    model: str, out: Path, settings: RetentionSettings = RetentionSettings(), *, threads: int | None = None, prompts: Path | None = None,
    retain: Path | None = None, progress: bool = True,
) -> RetentionStudy:
    """How retention on unseen kinds of harm depends on the retain set's size, the regularization, and the strength, for `conditional`.

    Asks the benchmark's fit split only, in cross-validation. Writes one JSON file a condition and `retention.json` to the folder `out`;
    finished conditions are not measured twice. Raises `TrailmedError` for bad input.
    """
    source = resolve_model(model, progress=progress)
    edit = EditJob(source, out, EditSettings(), threads=threads or physical_cores(), prompts=prompts, retain=retain, progress=progress)
    if not any(prompt.category is Category.SHOULD_REFUSE for prompt in edit.shown):
        raise TrailmedError("no harmful prompt is in the fit split; there is no retention to study")
    job = _RetentionJob(edit, out, settings)
    conditions = job.conditions()
    manifest = {"format": "trailmed.study.retention", **edit.manifest(), "conditions": sorted(conditions)}
    with Stages(out, manifest, total=len(conditions) + 1, progress=progress) as stages:
        stages.run(*edit.direction_stages()[0])
        for name in conditions:
            stages.run(name, [job.path(name)], partial(job.measure, name))
        found = {name: _STORED.validate_python(read_json(job.path(name))) for name in conditions}
        path = out / "retention.json"
        write_json_atomically(path, {name: asdict(each) for name, each in found.items()})
    return RetentionStudy(path, found)


def retention_rows(study: RetentionStudy) -> Sequence[tuple[str, ...]]:
    """The study as rows of text, one a condition, for a table."""
    return [
        (
            name, str(each.prompts), f"{each.benign_refused} of {each.benign} ({each.base_benign_refused})",
            f"{each.harmful_seen_refused} of {each.harmful} ({each.base_harmful_refused})",
            f"{each.harmful_unseen_refused} of {each.harmful}", f"{each.separation_seen:.3f}", f"{each.separation_unseen:.3f}",
            f"{each.unseen_at_2_percent:.0%}",
        )
        for name, each in study.conditions.items()
    ]
