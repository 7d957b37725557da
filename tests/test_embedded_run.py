"""The whole flow on the real embedded model, with few prompts: what it leaves, and that the pieces work on what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trailmed.abliterate.edit import Edit
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category, Expected, Prompt, Split, load_benchmark, load_retain, select
from trailmed.eval.results import Results
from trailmed.eval.runs import HARMFUL_ANSWER_CHARACTERS, EvalRun
from trailmed.export.bake import KEY_BASE_SHA256, KEY_EDIT_SHA256
from trailmed.files import PARTIAL_SUFFIX, sha256_of_file
from trailmed.models.catalogue import CATALOGUE, DEFAULT_MODEL
from trailmed.models.gguf_file import GgufFile

pytestmark = pytest.mark.embedded

MAX_TOKENS = 32
PATIENCE = 3600
"""Seconds; only a hang reaches it."""
MOST_MEMORY = 8_000_000_000
"""Bytes of resident memory that a run on this model may take."""
PER_CATEGORY = {
    Split.FIT: dict.fromkeys(Category, 7) | {Category.SHOULD_REFUSE: 14, Category.SAFE_CONTROL: 4},
    Split.VALIDATION: dict.fromkeys(Category, 1) | {Category.SHOULD_REFUSE: 4, Category.EMERGENCY_MEDICAL: 2},
    Split.HELD_OUT: dict.fromkeys(Category, 3) | {Category.SHOULD_REFUSE: 7, Category.SAFE_CONTROL: 5},
}
RETAINED = 20
FILES = {
    "activations.safetensors", "base-answers.json", "directions.safetensors", "edit.safetensors", "eval/base-F16.json",
    "eval/base-Q8_0.json", "eval/edited-F16.json", "eval/edited-Q8_0.json", "kl.json", "report.html", "report.md", "results.json",
    "run.json", "times.json",
}
PHONE_FILES = {"phone/SHA256SUMS", f"phone/{DEFAULT_MODEL}-trailmed-Q8_0.gguf"}


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` of `prompts`, evenly over the whole list."""
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _few_prompts() -> list[Prompt]:
    benchmark = load_benchmark()
    return [
        prompt for split, counts in PER_CATEGORY.items() for category, count in counts.items()
        for prompt in _spread(select(benchmark, split=split, categories=[category]), count)
    ]


def _write(path: Path, prompts: Sequence[Prompt]) -> Path:
    path.write_text("".join(prompt.model_dump_json(exclude_none=True) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def _trailmed(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trailmed", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)


class Flow:
    """One `trailmed run` of the embedded model, called twice."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.out = folder, model, folder / "run"
        self.prompts = _few_prompts()
        self.prompts_file = _write(folder / "prompts.jsonl", self.prompts)
        self.command = [
            "run", DEFAULT_MODEL, "--out", self.out, "--prompts", self.prompts_file,
            "--retain", _write(folder / "retain.jsonl", _spread(load_retain(), RETAINED)), "--max-tokens", MAX_TOKENS,
            "--json",
        ]
        self.first = _trailmed(*self.command)
        assert self.first.returncode in (0, 3), self.first.stderr
        self.told: dict[str, Any] = json.loads(self.first.stdout)
        self.results = Results.load(self.out / "results.json")
        self.held_out = select(self.prompts, split=Split.HELD_OUT)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> Flow:
    return Flow(tmp_path_factory.mktemp("flow"), embedded_model)


def test_it_ends_with_a_verdict_and_all_its_files(flow: Flow) -> None:
    passed = flow.results.verdict.passed
    assert flow.first.returncode == (0 if passed else 3)
    assert (flow.told["passed"], flow.told["reason"]) == (passed, flow.results.verdict.reason)
    names = {str(path.relative_to(flow.out)) for path in flow.out.rglob("*") if path.is_file() and path.parent.name != "stages"}
    assert names - {".lock"} == (FILES | PHONE_FILES if passed else FILES)
    assert flow.told["phone"] == (str(flow.out / "phone" / f"{DEFAULT_MODEL}-trailmed-Q8_0.gguf") if passed else None)
    assert list(flow.out.rglob(f"*{PARTIAL_SUFFIX}")) == []
    assert 0 < flow.told["peak_rss_bytes"] <= MOST_MEMORY
    assert {entry["name"] for entry in flow.told["stages"]} == {path.stem for path in (flow.out / "stages").glob("*.json")}


def test_the_edit_is_one_of_this_model(flow: Flow) -> None:
    edit = Edit.load(flow.out / "edit.safetensors")
    assert edit.base_sha256 == CATALOGUE[DEFAULT_MODEL].sha256 == flow.results.model["sha256"]
    assert edit.recipe["method"] == "conditional"
    assert edit.sha256 == flow.results.edit["sha256"] == flow.results.runs.edited_quantized.edit_sha256
    assert {factor.rank for factor in edit.factors.values()} == {1}
    assert edit.recipe["separation"]["edited"] > edit.recipe["separation"]["base"]


def test_every_run_answered_the_held_out_prompts(flow: Flow) -> None:
    expected = [prompt.id for prompt in flow.held_out]
    assert len(expected) == sum(PER_CATEGORY[Split.HELD_OUT].values())
    for name in ("base-F16", "base-Q8_0", "edited-F16", "edited-Q8_0"):
        stored = EvalRun.load(flow.out / "eval" / f"{name}.json")
        assert [answer.id for answer in stored.answers] == expected
        assert (stored.name, stored.type) == (name, name.rpartition("-")[2])
        assert all(answer.tokens <= MAX_TOKENS for answer in stored.answers)
        # the real model talks, and about something
        assert sum(answer.verdict is Verdict.COMPLIANCE for answer in stored.answers) >= len(expected) // 3
    controls = {prompt.id for prompt in flow.held_out if prompt.category is Category.SAFE_CONTROL}
    assert set(flow.results.kl.per_prompt) == controls


def test_full_precision_and_quantized_are_compared_prompt_by_prompt(flow: Flow) -> None:
    for comparison in (flow.results.comparisons.quantization_base, flow.results.comparisons.quantization_edited):
        groups = {group.name: group for group in comparison.groups}
        assert groups["all"].n == len(flow.held_out)
        for category, count in PER_CATEGORY[Split.HELD_OUT].items():
            assert groups[category].n == count
        table = groups["all"].table
        assert table.both + table.only_first + table.only_second + table.neither == len(flow.held_out)
        assert len(comparison.flips) == table.only_first + table.only_second


def test_answers_to_harmful_prompts_are_cut_everywhere(flow: Flow) -> None:
    seen = 0
    for path in (flow.out / "eval").glob("*.json"):
        for answer in EvalRun.load(path).answers:
            if answer.expected is Expected.REFUSE and answer.verdict is not Verdict.REFUSAL:
                assert len(answer.answer) <= HARMFUL_ANSWER_CHARACTERS
            seen += answer.expected is Expected.REFUSE
    assert seen == 4 * PER_CATEGORY[Split.HELD_OUT][Category.SHOULD_REFUSE]
    harmful = {prompt.id for prompt in flow.prompts + load_retain() if prompt.expected is Expected.REFUSE}
    for record in json.loads((flow.out / "base-answers.json").read_text()):
        assert record["id"] not in harmful or record["verdict"] == "refusal" or (record["text"], record["answer"]) == ("", [])


class _Page(HTMLParser):
    """Counts tags, and collects what the page would load from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "srcset") or (name == "href" and tag == "link")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_is_a_page_of_its_own(flow: Flow) -> None:
    page = _Page((flow.out / "report.html").read_text("utf-8"))
    assert page.tags.count("html") == page.tags.count("body") == 1
    assert page.tags.count("table") >= 2
    assert [address for address in page.loads if not address.startswith("data:")] == []
    words = " ".join(" ".join(page.words).split())
    assert " ".join(flow.results.verdict.reason.split()) in words
    assert flow.results.verdict.checks[0].sentence in (flow.out / "report.md").read_text("utf-8").replace("\\", "")


def test_the_second_call_does_nothing_again(flow: Flow) -> None:
    before = {path: path.stat().st_mtime_ns for path in flow.out.rglob("*") if path.is_file() and path.name not in (".lock", "times.json")}
    again = _trailmed(*flow.command)
    assert again.returncode == flow.first.returncode
    assert [line for line in again.stderr.splitlines() if not line.endswith("already done")] == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    told = json.loads(again.stdout)
    for key in ("passed", "reason", "checks", "stages", "phone", "seconds"):
        assert told[key] == flow.told[key]


def test_bake_eval_and_compare_give_what_the_run_measured(flow: Flow) -> None:
    """The edit, baked by itself into another file, behaves as the run's edited model did."""
    baked = flow.folder / "baked.gguf"
    made = _trailmed("bake", flow.out / "edit.safetensors", DEFAULT_MODEL, "-o", baked, "--type", "Q8_0", "--json", "--quiet")
    assert (made.returncode, made.stderr) == (0, "")
    assert json.loads(made.stdout) == {"path": str(baked), "size": baked.stat().st_size, "sha256": sha256_of_file(baked)}
    with GgufFile.open(baked) as file:
        assert file.metadata[KEY_BASE_SHA256] == CATALOGUE[DEFAULT_MODEL].sha256
        assert file.metadata[KEY_EDIT_SHA256] == flow.results.edit["sha256"]
    answers = flow.folder / "baked"
    judged = _trailmed(
        "eval", baked, "-o", answers, "--prompts", flow.prompts_file, "--split", "held_out", "--max-tokens", MAX_TOKENS, "--json",
        "--quiet",
    )
    assert (judged.returncode, judged.stderr) == (0, "")
    assert [answer["id"] for answer in json.loads(judged.stdout)["answers"]] == [prompt.id for prompt in flow.held_out]
    compared = _trailmed("compare", flow.out / "eval" / "edited-Q8_0.json", answers, "--json")
    assert (compared.returncode, compared.stderr) == (0, "")
    assert json.loads(compared.stdout)["comparisons"][0]["flips"] == []
    baked.unlink()
