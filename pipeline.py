"""`run`: from a model's name to an edited, quantized, verified GGUF; the only place that knows every stage."""

from __future__ import annotations

import os
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__
from .abliterate.edit import Edit
from .device.llama_engine import LlamaEngine
from .device.llama_runtime import DecodeSettings
from .device.system import machine, peak_rss_bytes
from .editing import EditJob, Stage
from .errors import TrailmedError
from .eval.benchmark import KL, evaluate, first_token_kl
from .eval.prompts import Category, Split, select
from .eval.report import HTML_NAME, MARKDOWN_NAME, write_reports
from .eval.results import Results, assemble
from .eval.runs import EvalRun
from .export.bake import bake
from .export.ggml_quantize import file_type_of
from .files import read_json, sha256_of_file, write_atomically, write_json_atomically, write_text_atomically
from .models.architecture import architecture_of
from .models.chat_template import ChatTemplate
from .models.gguf_file import GgufFile
from .models.source import resolve_model
from .settings import RunSettings
from .stages import Stages, StageTime

RESULTS_NAME = "results.json"
TIMES_NAME = "times.json"
_BAKE = "bake"
_FULL_TYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """Where a run ended: its results and report, its times, and the phone's file, which exists only when the gate passed."""

    results: Results
    report: Path
    times: tuple[StageTime, ...]
    peak_rss_bytes: int
    phone: Path | None


def run(model: str, out: Path, settings: RunSettings = RunSettings(), *, progress: bool = True) -> RunOutcome:
    """Edit `model`, verify the edit on held-out prompts at full precision and quantized, and write everything to the folder `out`.

    Stages are skipped when they are done; the outcome does not depend on how often the run was interrupted. Raises `TrailmedError` for
    bad input. A gate that fails is an outcome, not an error: then no phone file is left.
    """
    file_type_of(settings.type)
    source = resolve_model(model, progress=progress)
    job = _Job(source, model, out, settings, progress)
    with Stages(out, job.manifest(), total=len(job.plan()), progress=progress) as stages:
        # A finished run has no baked files but the phone's any more, and needs none as long as all else is there.
        if not all(stages.is_done(name) for name, _, _ in job.plan() if name != _BAKE):
            for stage in job.plan():
                stages.run(*stage)
        job.tidy()
        times = stages.times(name for name, _, _ in job.plan())
        write_json_atomically(out / TIMES_NAME, [asdict(entry) for entry in times])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peak = max(peak_rss_bytes(), children, *(entry.peak_rss_bytes for entry in times))
    return RunOutcome(Results.load(out / RESULTS_NAME), out / HTML_NAME, times, peak, job.phone if job.phone.exists() else None)


class _Job:
    """One run's paths and stages."""

    def __init__(self, source: Path, model: str, out: Path, settings: RunSettings, progress: bool) -> None:
        self.source, self.out, self.settings, self.progress = source, out, settings, progress
        self.command = f"trailmed run {model}"
        with GgufFile.open(source) as file:
            kind = file.metadata.get("general.file_type")
            template = file.metadata.get("tokenizer.chat_template")
            architecture_of(file)
        ChatTemplate(template if isinstance(template, str) else None, origin=str(source)).prompt("ping")
        self.editing = EditJob(
            source, out, settings.edit, threads=settings.threads, prompts=settings.prompts, retain=settings.retain, progress=progress,
        )
        self.held_out = select(self.editing.benchmark, split=Split.HELD_OUT)
        self.control = select(self.held_out, categories=[Category.SAFE_CONTROL])
        if not self.control:
            raise TrailmedError("the held-out prompts hold no safe_control prompt; the gate measures KL on them, so give some")
        self.quantized = settings.type.upper()
        self.full = next((name for name in _FULL_TYPES if kind == file_type_of(name)), "F16")
        if self.quantized == self.full:
            raise TrailmedError(f"{source}: is of type {self.full} itself; choose a quantized type for the phone, such as Q8_0")
        work = out / "work"
        self.base_full = source if kind == file_type_of(self.full) else work / f"base-{self.full}.gguf"
        self.base_quantized = source if kind == file_type_of(self.quantized) else work / f"base-{self.quantized}.gguf"
        self.edited_full = work / f"edited-{self.full}.gguf"
        self.edited_quantized = work / f"edited-{self.quantized}.gguf"
        self.kl = out / "kl.json"
        self.phone = out / "phone" / f"{source.stem}-trailmed-{self.quantized}.gguf"
        self.decode = DecodeSettings(
            max_tokens=settings.max_tokens, slots=settings.slots, threads=settings.threads, exact=settings.exact,
        )

    def manifest(self) -> dict[str, Any]:
        """What identifies this run: a folder that holds another one is not touched."""
        return {
            "format": "trailmed.run", "trailmed": __version__, **self.editing.manifest(), "type": self.quantized,
            "decode": asdict(self.decode),
        }

    def plan(self) -> list[Stage]:
        """Every stage, in order."""
        baked = [self.base_full, self.base_quantized, self.edited_full, self.edited_quantized]
        return [
            *self.editing.stages(),
            (_BAKE, [path for path in baked if path != self.source], self._bake),
            self._evaluation("base", self.full, self.base_full),
            self._evaluation("base", self.quantized, self.base_quantized),
            self._evaluation("edited", self.full, self.edited_full),
            self._evaluation("edited", self.quantized, self.edited_quantized),
            ("first-token KL", [self.kl], self._kl),
            ("results", [self.out / RESULTS_NAME], self._results),
            ("phone", self._phone_files, self._make_phone_folder),
            ("report", [self.out / HTML_NAME, self.out / MARKDOWN_NAME], lambda: write_reports(self.out / RESULTS_NAME)),
        ]

    def tidy(self) -> None:
        """Take away what only the run itself needed: an edited model that did not pass the gate goes with it."""
        shutil.rmtree(self.out / "work", ignore_errors=True)

    def _bake(self) -> None:
        self.editing.forget_model()
        edit = Edit.load(self.editing.edit)
        options: dict[str, Any] = {"threads": self.settings.threads, "progress": self.progress}
        if self.base_full != self.source:
            bake(None, self.source, self.base_full, self.full, **options)
        bake(edit, self.source, self.edited_full, self.full, **options)
        if self.base_quantized == self.source:
            bake(edit, self.source, self.edited_quantized, self.quantized, **options)
        else:
            bake(None, self.base_full, self.base_quantized, self.quantized, **options)
            bake(None, self.edited_full, self.edited_quantized, self.quantized, **options)

    def _evaluation(self, who: str, kind: str, path: Path) -> Stage:
        out = self._run_path(who, kind)

        def answer() -> None:
            with LlamaEngine(path, self.decode) as engine:
                evaluate(engine, self.held_out, name=f"{who}-{kind}", progress=self.progress).save(out)

        return f"answers of {who} {kind}", [out], answer

    def _run_path(self, who: str, kind: str) -> Path:
        return self.out / "eval" / f"{who}-{kind}.json"

    def _kl(self) -> None:
        found = first_token_kl(self.base_full, self.edited_full, self.control, self.decode, progress=self.progress)
        write_json_atomically(self.kl, asdict(found))

    def _results(self) -> None:
        edit = Edit.load(self.editing.edit)
        runs = [EvalRun.load(self._run_path(who, kind)) for kind in (self.full, self.quantized) for who in ("base", "edited")]
        assemble(
            *runs, kl=KL(**read_json(self.kl)), removed=self.settings.edit.removed, seed=self.settings.edit.seed,
            split=str(Split.HELD_OUT), model={"name": self.source.name, "sha256": sha256_of_file(self.source)},
            edit={"sha256": edit.sha256, "parameters": edit.size, "tensors": len(edit.factors), "recipe": dict(edit.recipe)},
            machine=asdict(machine()), command=[self.command],
        ).save(self.out / RESULTS_NAME)

    def _phone_files(self) -> list[Path]:
        """What the phone gets: nothing unless the gate passed."""
        passed = Results.load(self.out / RESULTS_NAME).verdict.passed
        return [self.phone, self.phone.with_name("SHA256SUMS")] if passed else []

    def _make_phone_folder(self) -> None:
        if not self._phone_files():
            return
        with write_atomically(self.phone) as scratch:
            try:
                # A second name for the same bytes: the first one stays until the stage is stamped.
                os.link(self.edited_quantized, scratch)
            except OSError:
                # Not every file system has hard links (exFAT, some network mounts).
                shutil.copyfile(self.edited_quantized, scratch)
        write_text_atomically(self.phone.with_name("SHA256SUMS"), f"{sha256_of_file(self.phone)}  {self.phone.name}\n")
