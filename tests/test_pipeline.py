"""A whole run on a tiny model that really refuses: what it leaves behind, and that being killed makes no difference."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dying_run import run_until
from refusing_model import EDIT_OPTIONS, PER_SPLIT, SAYS, refusing_gguf, write_prompts, write_retain

from trailmed import editing
from trailmed.abliterate.edit import Edit
from trailmed.device.llama_engine import LlamaEngine
from trailmed.device.llama_runtime import DecodeSettings
from trailmed.errors import TrailmedError
from trailmed.eval.benchmark import evaluate
from trailmed.eval.prompts import Category, Split, load_prompts, select
from trailmed.eval.results import Results
from trailmed.eval.runs import EvalRun
from trailmed.export.bake import KEY_BASE_SHA256, KEY_EDIT_SHA256
from trailmed.files import PARTIAL_SUFFIX, sha256_of_file
from trailmed.models.gguf_file import GgufFile
from trailmed.pipeline import RunOutcome, run
from trailmed.settings import EditSettings, Method, RunSettings

STAGES = [
    "base answers", "activations", "directions", "edit by distill", "bake", "answers of base F32", "answers of base Q8_0",
    "answers of edited F32", "answers of edited Q8_0", "first-token KL", "results", "phone", "report",
]
ARTIFACTS = {
    "activations.safetensors", "base-answers.json", "directions.safetensors", "edit.safetensors", "eval/base-F32.json",
    "eval/base-Q8_0.json", "eval/edited-F32.json", "eval/edited-Q8_0.json", "kl.json", "phone/SHA256SUMS",
    "phone/tiny-trailmed-Q8_0.gguf", "report.html", "report.md", "results.json", "run.json",
}
"""All that a run leaves but its times, which differ from one to the next."""
PATIENCE = 600
"""Seconds; only a hang reaches it."""


class Bench:
    """A model, its prompts, and an undisturbed run of them by the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "undisturbed"
        self.model = refusing_gguf(folder / "tiny.gguf")
        self.prompts = write_prompts(folder / "prompts.jsonl")
        self.retain = write_retain(folder / "retain.jsonl")
        self.finished = subprocess.run(
            self.command(self.out, "--json"), capture_output=True, text=True, check=False, timeout=PATIENCE,
        )

    def command(self, out: Path, *more: str) -> list[str]:
        return [
            sys.executable, "-m", "trailmed", "run", str(self.model), "--out", str(out), "--prompts", str(self.prompts),
            "--retain", str(self.retain), *EDIT_OPTIONS, "--threads", "1", "--max-tokens", "12", *more,
        ]

    @property
    def settings(self) -> RunSettings:
        """What `command` says."""
        options = dict(zip(EDIT_OPTIONS[::2], EDIT_OPTIONS[1::2], strict=True))
        return RunSettings(
            edit=EditSettings(method=Method(options["--method"]), rank=int(options["--rank"]), epochs=int(options["--epochs"])),
            threads=1, max_tokens=12, prompts=self.prompts, retain=self.retain,
        )

    def run(self, out: Path, **changes: Any) -> RunOutcome:
        """The same in this process."""
        values = {name: getattr(self.settings, name) for name in RunSettings.__dataclass_fields__}
        return run(str(self.model), out, RunSettings(**values | changes), progress=False)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(tmp_path_factory.mktemp("bench"))
    assert made.finished.returncode == 0, made.finished.stderr + made.finished.stdout
    return made


@pytest.fixture
def copied(bench: Bench, tmp_path: Path) -> Path:
    """A finished run's folder to play with."""
    subprocess.run(["cp", "-a", str(bench.out), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def _artifacts(out: Path) -> dict[str, str]:
    """Name and hash of all files but stamps, times and the lock."""
    names = (path.relative_to(out) for path in out.rglob("*") if path.is_file())
    return {str(name): sha256_of_file(out / name) for name in names if name.parts[0] not in ("stages", ".lock", "times.json")}


def _stamps(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (out / "stages").glob("[!.]*.json")}


def _partials(out: Path) -> list[Path]:
    return list(out.rglob(f"*{PARTIAL_SUFFIX}"))


# --- an undisturbed run


def test_a_run_leaves_exactly_its_artifacts(bench: Bench) -> None:
    assert set(_artifacts(bench.out)) == ARTIFACTS
    assert _partials(bench.out) == []
    assert not (bench.out / "work").exists()
    assert set(_stamps(bench.out)) == set(STAGES)
    assert [entry["name"] for entry in json.loads((bench.out / "times.json").read_text())] == STAGES


def test_json_goes_to_stdout_and_everything_else_to_stderr(bench: Bench) -> None:
    told = json.loads(bench.finished.stdout)
    results = Results.load(bench.out / "results.json")
    assert told["passed"] is True
    assert (told["reason"], len(told["checks"])) == (results.verdict.reason, len(results.verdict.checks))
    assert [Path(told[key]) for key in ("results", "report", "phone")] == [
        bench.out / "results.json", bench.out / "report.html", bench.out / "phone" / "tiny-trailmed-Q8_0.gguf",
    ]
    assert [entry["name"] for entry in told["stages"]] == STAGES
    assert told["peak_rss_bytes"] >= max(entry["peak_rss_bytes"] for entry in told["stages"]) > 10_000_000
    headings = [line for line in bench.finished.stderr.splitlines() if line.startswith("[")]
    assert headings == [f"[{number}/{len(STAGES)}] {name}" for number, name in enumerate(STAGES, start=1)]


def test_the_edit_takes_the_wrong_refusals_away_and_keeps_the_right_ones(bench: Bench) -> None:
    results = Results.load(bench.out / "results.json")
    assert results.verdict.passed
    for who, benign in (("base", PER_SPLIT["held_out"]), ("edited", 0)):
        for kind in ("F32", "Q8_0"):
            answers = EvalRun.load(bench.out / "eval" / f"{who}-{kind}.json").answers
            refused = {category: sum(a.refused for a in answers if a.category is category) for category in Category}
            assert refused[Category.SHOULD_REFUSE] == PER_SPLIT["held_out"]
            # the gate allows a fifth of them; so does this
            assert abs(refused[Category.WILDERNESS_SURVIVAL] - benign) <= PER_SPLIT["held_out"] // 5
            assert refused[Category.HOME_SAFETY] == refused[Category.SAFE_CONTROL] == 0


def test_results_are_about_the_held_out_prompts_and_nothing_else(bench: Bench) -> None:
    held_out = select(load_prompts(bench.prompts), split=Split.HELD_OUT)
    results = Results.load(bench.out / "results.json")
    assert results.split == "held_out"
    assert results.model["sha256"] == sha256_of_file(bench.model)
    assert results.edit["sha256"] == Edit.load(bench.out / "edit.safetensors").sha256
    for facts in (results.runs.base_full, results.runs.edited_full, results.runs.base_quantized, results.runs.edited_quantized):
        stored = EvalRun.load(bench.out / "eval" / f"{facts.name}.json")
        assert [answer.id for answer in stored.answers] == [prompt.id for prompt in held_out]
        assert facts.prompts == len(held_out) == len(SAYS) * PER_SPLIT["held_out"]
    assert set(results.kl.per_prompt) == {prompt.id for prompt in held_out if prompt.category is Category.SAFE_CONTROL}


def test_the_phones_file_is_the_one_that_was_measured(bench: Bench) -> None:
    phone = bench.out / "phone" / "tiny-trailmed-Q8_0.gguf"
    digest = sha256_of_file(phone)
    assert (bench.out / "phone" / "SHA256SUMS").read_text() == f"{digest}  {phone.name}\n"
    assert Results.load(bench.out / "results.json").runs.edited_quantized.model_sha256 == digest
    with GgufFile.open(phone) as file:
        assert file.metadata[KEY_BASE_SHA256] == sha256_of_file(bench.model)
        assert file.metadata[KEY_EDIT_SHA256] == Edit.load(bench.out / "edit.safetensors").sha256
    held_out = select(load_prompts(bench.prompts), split=Split.HELD_OUT)
    with LlamaEngine(phone, DecodeSettings(max_tokens=12, threads=1)) as engine:
        again = evaluate(engine, held_out, name="again", progress=False)
    assert again.answers == EvalRun.load(bench.out / "eval" / "edited-Q8_0.json").answers


def test_the_edit_never_saw_a_held_out_prompt(bench: Bench) -> None:
    held_out = {prompt.id for prompt in select(load_prompts(bench.prompts), split=Split.HELD_OUT)}
    seen = {record["id"] for record in json.loads((bench.out / "base-answers.json").read_text())}
    assert seen & held_out == set()
    assert len(seen) > 100


def test_of_what_the_base_says_to_harmful_prompts_only_refusals_are_kept(bench: Bench, tmp_path: Path) -> None:
    """Here the base answers every other harmful prompt: those whose text ends in "then"."""
    records = [json.loads(line) for line in bench.prompts.read_text().splitlines()]
    for record in records:
        if record["id"].startswith("then"):
            record |= {"category": "should_refuse", "expected": "refuse", "kind": "fraud"}
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(record) + "\n" for record in records))
    editing.directions(str(bench.model), tmp_path / "found", threads=1, prompts=mixed, retain=bench.retain, progress=False)
    kept = {record["id"]: record for record in json.loads((tmp_path / "found" / "base-answers.json").read_text())}
    refused, answered = ([record for name, record in kept.items() if name.startswith(word)] for word in ("lies", "then"))
    assert len(refused) == len(answered) == PER_SPLIT["fit"] + PER_SPLIT["validation"]
    assert all((record["verdict"], record["text"]) == ("refusal", SAYS["lies"]) for record in refused)
    assert all((record["verdict"], record["text"], record["answer"]) == ("compliance", "", []) for record in answered)


# --- again, and after damage


def test_a_finished_run_is_not_done_again(bench: Bench, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "load_model", _must_not_be_called)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name not in (".lock", "times.json")}
    outcome = bench.run(copied)
    assert outcome.results.verdict.passed
    assert outcome.phone == copied / "phone" / "tiny-trailmed-Q8_0.gguf"
    assert [entry.name for entry in outcome.times] == STAGES
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (copied / "work").exists()


@pytest.mark.parametrize("spoil", [
    lambda out: (out / "report.md").write_text("spoilt"),
    lambda out: (out / "results.json").unlink(),
    lambda out: (out / "eval" / "edited-Q8_0.json").write_text("{}"),
    lambda out: (out / "edit.safetensors").unlink(),
    lambda out: (out / "times.json").unlink(),
    lambda out: (out / "phone" / "tiny-trailmed-Q8_0.gguf").unlink(),
    lambda out: (out / "phone" / "SHA256SUMS").write_text("spoilt"),
    lambda out: (out / "phone" / "tiny-trailmed-Q8_0.gguf").write_bytes(b"GGUF"),
], ids=["report", "results", "answers", "edit", "times", "phone", "sums", "phone-damaged"])
def test_what_was_lost_or_damaged_is_made_again(bench: Bench, copied: Path, spoil: Callable[[Path], object]) -> None:
    spoil(copied)
    outcome = bench.run(copied)
    assert outcome.phone is not None
    assert _artifacts(copied) == _artifacts(bench.out)
    assert (copied / "times.json").exists()


def test_other_settings_do_not_touch_a_finished_run(bench: Bench, copied: Path) -> None:
    for changes, named in (({"type": "Q4_0"}, "type"), ({"max_tokens": 13}, "decode"), ({"edit": EditSettings(seed=1)}, "edit")):
        with pytest.raises(TrailmedError, match=rf"holds a run with other settings \({named}\)"):
            bench.run(copied, **changes)
    assert _artifacts(copied) == _artifacts(bench.out)


def test_a_failed_gate_leaves_the_report_and_no_model(bench: Bench, tmp_path: Path) -> None:
    """An edit of no strength changes nothing, and that is not what was asked for."""
    outcome = bench.run(tmp_path / "run", edit=EditSettings(method=Method.PROJECT, alpha=0.0))
    assert not outcome.results.verdict.passed
    assert outcome.phone is None
    assert outcome.report.is_file()
    assert list((tmp_path / "run").rglob("*.gguf")) == []
    assert not (tmp_path / "run" / "phone").exists()
    assert _stamps(tmp_path / "run").keys() == {name.replace("distill", "project") for name in STAGES}


# --- killed


@pytest.fixture(scope="module")
def targets(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every file that a run makes, in the order in which they appear; found by a run of another process."""
    folder = tmp_path_factory.mktemp("recorded")
    assert run_until(str(bench.model), folder / "run", bench.settings, None, after=False, record=folder / "names.json") == 0
    assert _artifacts(folder / "run") == _artifacts(bench.out)
    names: list[str] = json.loads((folder / "names.json").read_text())
    assert len(names) == len(set(names)) > len(STAGES) + len(ARTIFACTS)
    return names


def test_killed_at_every_file_it_makes_a_run_ends_with_the_same_bytes(bench: Bench, targets: list[str], tmp_path: Path) -> None:
    """One folder, one process after the other: each gets one file further and dies, in turns just before and just after it appears."""
    out = tmp_path / "run"
    seen: dict[str, int] = {}
    for position, target in enumerate(targets):
        after = position % 2 == 0
        code = run_until(str(bench.model), out, bench.settings, target, after=after)
        assert code == -signal.SIGKILL, target
        assert (out / target).exists() == after
        stamps = _stamps(out)
        assert {name: stamps.get(name) for name in seen} == seen, f"a finished stage was done again at {target}"
        seen = stamps
    assert run_until(str(bench.model), out, bench.settings, None, after=False) == 0
    assert {name: mtime for name, mtime in _stamps(out).items() if name in seen} == seen
    assert _artifacts(out) == _artifacts(bench.out)
    assert _partials(out) == []
    assert not (out / "work").exists()


def _headings(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("["):
            yield line


def test_killed_at_random_moments_the_command_ends_with_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    generator = random.Random(1)
    out = tmp_path / "run"
    seen: dict[str, int] = {}
    for stage in sorted(generator.sample(STAGES[:-1], 3), key=STAGES.index):
        with subprocess.Popen(bench.command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            next((line for line in _headings(process) if line.rstrip().endswith(f"] {stage}")), None)
            time.sleep(generator.uniform(0, 0.3))
            process.kill()
        stamps = _stamps(out)
        assert {name: stamps.get(name) for name in seen} == seen
        seen = stamps
    finished = subprocess.run(bench.command(out, "--quiet"), capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert {name: mtime for name, mtime in _stamps(out).items() if name in seen} == seen
    assert _artifacts(out) == _artifacts(bench.out)
    assert _partials(out) == []


def test_an_interrupted_command_says_how_to_go_on(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with subprocess.Popen(bench.command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert next(line for line in _headings(process) if "edit by distill" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "trailmed: interrupted; run the same command again to go on where it stopped"
    assert "Traceback" not in rest
    assert _partials(out) == []
    assert set(_stamps(out)) == set(STAGES[:3])


def _must_not_be_called(*_: object, **__: object) -> None:
    raise AssertionError("a finished run loads no model")
