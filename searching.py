"""`search` and `pick`: many edits tried by a cheap proxy, the best trade-offs between its objectives, and any of them as an `Edit`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from . import __version__
from .abliterate.activations import Activations
from .abliterate.answers import greedy_answers
from .abliterate.edit import Edit
from .abliterate.factors import Pairs, attached
from .abliterate.observed import Observed, evenly_spread
from .abliterate.proxy import Measured, Proxy
from .abliterate.teacher import refusal_openings
from .abliterate.validation import by_kind, telling
from .device.system import physical_cores
from .editing import RETAIN_ASKED, EditJob, Stage
from .errors import TrailmedError
from .eval.document import first_fault
from .eval.prompts import Category, Prompt
from .files import lock_folder, read_json, sha256_of_json, write_json_atomically, write_text_atomically
from .fitting import is_refusal, observe, origin_of, read_observed, sampled_scenarios
from .models.architecture import architecture_of
from .models.gguf_file import GgufFile
from .models.hf_config import hf_config
from .models.source import resolve_model
from .progress import Advance, progress_bar
from .search_report import pareto_page
from .search_results import Calibration, SearchResults, Tally, pareto_front
from .search_space import Candidates, Learned, Space, most_rank
from .settings import Method, SearchSettings
from .stages import LOCK_NAME, MANIFEST_NAME, Stages

if TYPE_CHECKING:
    from .search_study import SharedStudy

RESULTS_NAME = "search.json"
PAGE_NAME = "pareto.html"
_JOURNAL = "trials.journal"
_MOST_FAILURES = 20
"""Trials in a row whose edits break the model, before the search is given up."""


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """What a search found, where it lies, and the median seconds of a trial."""

    results: SearchResults
    path: Path
    page: Path
    seconds_per_trial: float | None


def search(
    model: str, out: Path, settings: SearchSettings = SearchSettings(), *, threads: int | None = None, prompts: Path | None = None,
    retain: Path | None = None, progress: bool = True,
) -> SearchOutcome:
    """Try edits of `model` until `settings.trials` are complete, and write search.json and pareto.html to the folder `out`.

    Asked are fit and validation prompts, never held-out ones. Started again it goes on; several may work in one folder, or in folders
    of their own with one `settings.storage`. Raises `TrailmedError` for bad input.
    """
    study_module = _study_module()
    source = resolve_model(model, progress=progress)
    job = _SearchJob(source, out, settings, threads or physical_cores(), prompts, retain, progress)

    def opened(storage: Path | str) -> SharedStudy:
        found: SharedStudy = study_module.SharedStudy(storage, settings.study, job.facts(), settings.seed)
        return found

    study = opened(settings.storage) if settings.storage is not None else None  # before the work that would be for nothing
    job.prepare()
    study = study or opened(out / _JOURNAL)
    with study_module.storage_errors(settings.storage or out / _JOURNAL):
        _run_trials(job, study, settings, progress)
        results = _results(job, study)
        if settings.calibrate:
            _calibrate(job, study, results, settings, progress)
            results = _results(job, study)
        seconds = study.seconds()
    lock = lock_folder(out, LOCK_NAME, wait=True)
    try:
        write_json_atomically(out / RESULTS_NAME, results.model_dump(mode="json"))
        write_text_atomically(out / PAGE_NAME, pareto_page(results))
    finally:
        lock.release()
    return SearchOutcome(results, out / RESULTS_NAME, out / PAGE_NAME, seconds)


def pick(
    model: str, searched: Path, trial: int, out: Path, *, prompts: Path | None = None, retain: Path | None = None, progress: bool = True,
) -> Edit:
    """Make the edit of a trial of the search in the folder `searched` anew, and write it to the file `out`.

    The same trial, the same bytes; it runs on as many threads as the search. Raises `TrailmedError` for bad input, such as another model
    or other prompts than those of the search.
    """
    results = SearchResults.load(searched / RESULTS_NAME)
    chosen = results.trial(trial)
    kept = _kept_facts(searched / MANIFEST_NAME)
    source = resolve_model(model, progress=progress)
    settings = SearchSettings(remove=kept.remove, keep=kept.keep, methods=kept.methods)
    job = _SearchJob(source, searched, settings, kept.threads, prompts, retain, progress)
    job.prepare()
    if results.facts != job.facts():
        raise TrailmedError(f"{searched / RESULTS_NAME}: is of another search than the folder; run the search again")
    recipe = {"search": {"trial": trial, "facts_sha256": sha256_of_json(job.facts())}}
    try:
        made = job.candidates.edit(chosen.parameters, recipe=recipe)
    except ValueError as error:
        raise TrailmedError(f"{searched / RESULTS_NAME}: trial {trial} makes no edit ({error}); run the search again") from error
    made.save(out)
    return made


class _SearchJob:
    """What all trials of one search share; whatever needs the module is computed when a trial first asks for it."""

    def __init__(
        self, source: Path, folder: Path, settings: SearchSettings, threads: int, prompts: Path | None, retain: Path | None, progress: bool,
    ) -> None:
        with GgufFile.open(source) as file:
            self.blocks = int(hf_config(file, architecture_of(file)).get_text_config().num_hidden_layers)
        self.folder, self.settings, self.progress = folder, settings, progress
        self.editing = EditJob(source, folder, settings.edit, threads=threads, prompts=prompts, retain=retain, progress=progress)
        self._retain_answers = folder / "retain-answers.json"
        self._everyday = [prompt for prompt in self.editing.benchmark if prompt.category is Category.SAFE_CONTROL]

    def facts(self) -> dict[str, Any]:
        """What makes the trials of two searches comparable: everything but threads, seed, number of trials and storage."""
        manifest = self.editing.manifest()
        settings = self.settings
        return {
            "trailmed": __version__, **{name: value for name, value in manifest.items() if name not in ("edit", "threads")},
            "remove": list(settings.remove), "keep": list(settings.keep), "methods": list(settings.methods), "blocks": self.blocks,
        }

    def prepare(self) -> None:
        """The stages that trials build on; of several workers in one folder the first does them, and the others wait for it."""
        plan = self._plan()
        manifest = {"format": "trailmed.search", **self.facts(), "threads": self.editing.threads}
        with Stages(self.folder, manifest, total=len(plan), progress=self.progress, wait=True) as stages:
            for stage in plan:
                stages.run(*stage)

    def _plan(self) -> list[Stage]:
        answers, activations, _ = self.editing.direction_stages()
        plan = [answers]
        if {Method.GATED, Method.PROJECT} & {*self.settings.methods}:
            plan.append(activations)
        if Method.GATED in self.settings.methods:
            plan.append(("answers to the retain set", [self._retain_answers], self._observe_retained))
        return plan

    @property
    def _retained(self) -> list[Prompt]:
        """The part of the retain set that `gated` learns from, for which the base must be asked, as `edit` does."""
        fit = {prompt.id for prompt in self.editing.fit}
        return [prompt for prompt in sampled_scenarios(self.editing.retain, RETAIN_ASKED) if prompt.id in fit]

    def _observe_retained(self) -> None:
        observe(self.editing.model, self._retained, self._retain_answers, progress=self.progress)

    @cached_property
    def _observed(self) -> tuple[list[Observed], list[Observed]]:
        return self.editing.observed()

    @cached_property
    def space(self) -> Space:
        return Space(self.settings.methods, self.blocks, most_rank(self._shown, self.settings.edit.removed))

    @property
    def _shown(self) -> list[Observed]:
        return self._observed[0][: len(self.editing.shown)]

    @cached_property
    def candidates(self) -> Candidates:
        """Makes edits from settings."""
        editing, methods = self.editing, {*self.settings.methods}
        retained = read_observed(editing.model, self._retained, self._retain_answers) if Method.GATED in methods else []
        learned = Learned(
            fit=self._observed[0], asked=[*self._shown, *retained], shown=self._shown,
            activations=Activations.load(editing.activations) if {Method.GATED, Method.PROJECT} & methods else None,
        )
        origin = origin_of(editing.source, editing.settings, [*editing.benchmark, *editing.retain])
        return Candidates(editing.model, self.space, learned, editing.settings, origin, progress=self.progress)

    @cached_property
    def proxy(self) -> Proxy:
        """Asks validation prompts, and the benchmark's everyday ones of fit and validation."""
        fit, validation = self._observed
        asked = telling(validation, self.settings.edit.removed)
        everyday = {prompt.id for prompt in self._everyday}
        controls = [prompt for prompt in [*fit, *validation] if prompt.id in everyday]
        if not controls or len({prompt.should_refuse for prompt in asked}) < 2:
            raise TrailmedError(
                "a search needs validation prompts that are benign (of the categories to remove) and harmful, and safe_control prompts; "
                "give more prompts"
            )
        return Proxy(self.editing.model.module, asked, controls, refusal_openings(fit), self.candidates.first_block)

    def measure(self, parameters: dict[str, Any]) -> Measured:
        """The objectives of a trial."""
        return self.proxy.measure(worn(self.candidates.edit(parameters)))


def worn(edit: Edit) -> Pairs:
    """The edit's factors as a running module wears them (`attached`)."""
    return {name: (torch.tensor(factor.b), torch.tensor(factor.a)) for name, factor in edit.factors.items()}


def _run_trials(job: _SearchJob, study: SharedStudy, settings: SearchSettings, progress: bool) -> None:
    seen = study.complete()
    if seen >= settings.trials and study.base is not None:
        return
    job.candidates.prepare()
    if study.base is None:
        study.set_base(job.proxy.measure({}))
    study.begin(job.space)
    failures = 0
    with progress_bar("trials", max(0, settings.trials - seen), enabled=progress) as advance:
        def counted(complete: int) -> None:
            nonlocal seen
            advance(max(0, min(complete, settings.trials) - seen))
            seen = max(seen, complete)

        while (trial := study.ask(job.space, settings.trials, counted)) is not None:
            try:
                study.tell(trial, job.measure(trial.params))
                failures = 0
            except ValueError:  # factors or figures that are no numbers
                study.fail(trial.number)
                failures += 1
                if failures == _MOST_FAILURES:
                    raise TrailmedError(f"{failures} edits in a row broke the model; search over other methods, or report this") from None
            except BaseException:
                study.fail(trial.number)
                raise


def _results(job: _SearchJob, study: SharedStudy) -> SearchResults:
    trials = study.records()
    base = study.base
    if base is None:
        raise TrailmedError("the storage lost what the unedited model does; start the search anew in another folder")
    noted = (Calibration.model_validate(found) for _, found in sorted(study.calibrations().items()))
    return SearchResults(facts=job.facts(), base=base, trials=tuple(trials), front=pareto_front(trials), calibration=tuple(noted))


def _calibrate(job: _SearchJob, study: SharedStudy, results: SearchResults, settings: SearchSettings, progress: bool) -> None:
    """Hold the proxy against judged answers at points spread over the front, unless that was done with as many tokens."""
    known = {each.trial for each in results.calibration if each.tokens == settings.calibrate_tokens}
    chosen = [number for number in evenly_spread(results.front, settings.calibrate) if number not in known]
    if not chosen:
        return
    edits = {number: worn(job.candidates.edit(results.trial(number).parameters)) for number in chosen}
    with progress_bar("answers to calibrate the proxy by", len(edits) * len(job.proxy.prompts), enabled=progress) as advance:
        for number, factors in edits.items():
            study.note_calibration(number, _calibrated(job, number, factors, settings.calibrate_tokens, advance).model_dump(mode="json"))


def _calibrated(job: _SearchJob, trial: int, factors: Pairs, tokens: int, advance: Advance) -> Calibration:
    model, prompts = job.editing.model, job.proxy.prompts
    told = job.proxy.refusals(factors)
    with attached(model.module, factors):
        answers = greedy_answers(
            model.module, [prompt.token_ids for prompt in prompts], tokens, model.tokenizer.eos_ids, progress=advance,
        )
    judged = [is_refusal(model, answer) for answer in answers]
    benign, harmful = (Tally.of(*words) for words in zip(by_kind(prompts, judged), by_kind(prompts, told), strict=True))
    return Calibration.of(trial, tokens, benign, harmful)


class _KeptFacts(BaseModel):
    """What `pick` needs of a search's manifest."""

    model_config = ConfigDict(extra="ignore")

    remove: tuple[Category, ...]
    keep: tuple[Category, ...]
    methods: tuple[Method, ...]
    threads: int


def _kept_facts(path: Path) -> _KeptFacts:
    document = read_json(path)
    try:
        return _KeptFacts.model_validate(document)
    except ValidationError as error:
        raise TrailmedError(f"{path}: not the record of a search ({first_fault(error)}); name the folder of one") from error


def _study_module() -> Any:
    try:
        return import_module(".search_study", __package__)
    except ImportError as error:
        raise TrailmedError("a search needs Optuna, which is not installed; run `pip install trailmed[search]`") from error
