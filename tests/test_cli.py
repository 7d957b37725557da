"""The command line: it explains itself, answers on stdout, complains on stderr, and takes bad input with one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from refusing_model import CATEGORIES, refusing_gguf, write_prompts, write_retain
from small_disk import small_disk
from small_models import tiny_gguf
from typer.testing import CliRunner

from trailmed import __version__, files
from trailmed.abliterate.edit import Edit, Factor
from trailmed.cli import app
from trailmed.eval.prompts import Category
from trailmed.eval.results import Results
from trailmed.eval.rubric import RUBRIC_CATEGORIES
from trailmed.eval.run_folder import load_run
from trailmed.eval.runs import EvalRun
from trailmed.files import sha256_of_file
from trailmed.models.catalogue import CATALOGUE
from trailmed.models.fingerprint import fingerprint
from trailmed.models.gguf_file import GgufFile
from trailmed.settings import EditSettings, EvalSettings, RunSettings

PATIENCE = 300
"""Seconds; only a hang reaches it."""
QUICK = ("--threads", "1", "--quiet")


class Inputs:
    """Good and bad files, by name: `{name}` in a command stands for the file's path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        model = refusing_gguf(folder / "model.gguf")
        other = tiny_gguf(folder, seed=1).rename(folder / "other.gguf")
        (folder / "truncated.gguf").write_bytes(model.read_bytes()[:-20_000])
        (folder / "text.gguf").write_text("no model at all")
        tiny_gguf(folder, chat_template=False, seed=2).rename(folder / "no-template.gguf")
        tiny_gguf(folder, chat_template="{% for m in messages %}", seed=3).rename(folder / "bad-template.gguf")
        # gguf-py's writer puts the architecture first
        (folder / "unsupported.gguf").write_bytes(model.read_bytes().replace(b"qwen2", b"zamba", 1))
        write_prompts(folder / "prompts.jsonl")
        write_prompts(folder / "held-out-only.jsonl", splits=["held_out"])
        write_prompts(folder / "no-control.jsonl", words=[word for word in CATEGORIES if CATEGORIES[word] != "safe_control"])
        (folder / "broken.jsonl").write_text('{"id": "a"}\n')
        write_retain(folder / "retain.jsonl")
        (folder / "note.txt").write_text("something else")
        for name, source in (("model", model), ("other", other)):
            self._edit(name, source)

    def _edit(self, name: str, source: Path) -> None:
        with GgufFile.open(source) as file:
            d_out, d_in = file.tensors["blk.1.attn_output.weight"].shape
            factor = Factor(np.full((d_out, 1), 0.01, np.float32), np.full((1, d_in), 0.01, np.float32))
            factors = {"model.layers.1.self_attn.o_proj.weight": factor}
            made = Edit(factors, fingerprint(file), sha256_of_file(source), {"method": "made up"})
        made.save(self.folder / f"{name}-edit.safetensors")

    def fill(self, command: str) -> list[str]:
        """The command's words with `{name.ext}` replaced by paths."""
        return [re.sub(r"\{(.*?)\}", lambda found: str(self.folder / found[1]), word) for word in command.split()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the working directory, a cache of its own, and torch's threads as they were afterwards."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("TRAILMED_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield place
    torch.set_num_threads(threads)


def _call(words: list[str]) -> Any:
    return CliRunner().invoke(app, words, catch_exceptions=False)


def _answer(words: list[str]) -> Any:
    """The JSON that a command prints on stdout, with nothing on stderr."""
    result = _call([*words, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def _complaint(result: Any) -> str:
    """The one line of a command that was given bad input."""
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("trailmed: ")
    return str(line)


def _process(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trailmed", *words], capture_output=True, text=True, check=False, timeout=PATIENCE,
        env={**os.environ, **environment},
    )


# --- it explains itself


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))


COMMANDS = dict(_commands(typer.main.get_command(app)))


def _squeezed(text: str) -> str:
    """Without white space, because help is wrapped."""
    return "".join(text.split())


def test_the_commands_of_the_design_are_there() -> None:
    assert {" ".join(path) for path in COMMANDS} >= {
        "run", "directions", "edit", "bake", "eval", "triage", "compare", "report", "models list", "models fetch", "models show",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "trailmed")
def test_help_describes_the_command_and_every_option(path: tuple[str, ...]) -> None:
    result = _call([*path, "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    shown = _squeezed(result.stdout)
    command = COMMANDS[path]
    assert command.help
    assert _squeezed(command.help) in shown
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.help, f"{parameter.name} has no description"
            assert _squeezed(parameter.help) in shown, parameter.name
            assert all(flag in shown for flag in parameter.opts if flag.startswith("--"))


@pytest.mark.parametrize(("path", "settings"), [
    (("run",), EditSettings), (("run",), RunSettings), (("edit",), EditSettings), (("eval",), EvalSettings),
])
def test_settings_are_options_with_their_own_descriptions(path: tuple[str, ...], settings: type) -> None:
    options = {parameter.name: parameter.help for parameter in COMMANDS[path].params}
    described = {entry.name: entry.metadata["help"] for entry in fields(settings) if "help" in entry.metadata}
    shared = described.keys() & options.keys()
    assert {name: options[name] for name in shared} == {name: described[name] for name in shared}
    assert path != ("run",) or shared == described.keys()


def test_nothing_asked_is_answered_with_help_and_the_version_is_told() -> None:
    assert "Usage:" in _call([]).output
    assert _call(["--version"]).stdout == f"trailmed {__version__}\n"
    for program in ([sys.executable, "-m", "trailmed"], [str(Path(sys.executable).with_name("trailmed"))]):
        told = subprocess.run([*program, "--version"], capture_output=True, text=True, check=False, timeout=PATIENCE)
        assert (told.returncode, told.stdout, told.stderr) == (0, f"trailmed {__version__}\n", "")


@pytest.mark.parametrize("command", ["run", "nothing", "run {model.gguf} -o out --method magic", "run {model.gguf} -o out --rank four",
                                     "eval {model.gguf} --split test", "edit {model.gguf} -o out --threads -1"])
def test_a_misspelt_command_is_a_usage_error(inputs: Inputs, workplace: Path, command: str) -> None:
    result = _call(inputs.fill(command))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage:")
    assert list(workplace.iterdir()) == []


# --- bad input

MODEL_COMMANDS = {
    "run": "run {} -o out --prompts {{prompts.jsonl}} --retain {{retain.jsonl}} --threads 1",
    "directions": "directions {} -o out --prompts {{prompts.jsonl}} --retain {{retain.jsonl}} --threads 1",
    "edit": "edit {} -o out.safetensors --prompts {{prompts.jsonl}} --retain {{retain.jsonl}} --threads 1",
    "bake": "bake {{model-edit.safetensors}} {} -o out.gguf",
    "eval": "eval {} -o out --prompts {{prompts.jsonl}} --threads 1",
    "show": "models show {}",
}
BAD_MODELS = {
    "nowhere.gguf": "nowhere.gguf: no such file",
    "nowhere": "nowhere: neither a catalogue name, a GGUF file, a Hugging Face directory nor a hub id",
    "qwen2.5-coder": "did you mean qwen2.5-coder-0.5b-instruct",
    "{text.gguf}": "text.gguf: not a GGUF file",
    "{truncated.gguf}": "truncated.gguf: truncated",
    "{note.txt}": "note.txt: not a GGUF file",
    ".": "has no config.json",
}
CANNOT_EDIT = {
    "{unsupported.gguf}": "unsupported.gguf: architecture 'zamba' is not supported; supported are",
}
CANNOT_CHAT = {
    "{no-template.gguf}": "no-template.gguf: has no chat template",
    "{bad-template.gguf}": "bad-template.gguf: its chat template is broken",
}


def _bad_models() -> Iterator[Any]:
    for name, command in MODEL_COMMANDS.items():
        bad = dict(BAD_MODELS)
        if name in ("run", "directions", "edit", "bake"):
            bad |= CANNOT_EDIT
        if name in ("run", "directions", "edit", "eval"):
            bad |= CANNOT_CHAT
        for model, message in bad.items():
            yield pytest.param(command.format(model), message, id=f"{name} {model}")


BAD_OPTIONS = [
    ("run {model.gguf} -o out --remove medicine", "unknown category 'medicine'; choose from emergency_medical, "),
    ("run {model.gguf} -o out --keep medicine", "unknown category 'medicine'"),
    ("directions {model.gguf} -o out --remove medicine", "unknown category 'medicine'"),
    ("edit {model.gguf} -o out --keep medicine", "unknown category 'medicine'"),
    ("eval {model.gguf} -o out --category medicine", "unknown category 'medicine'"),
    ("run {model.gguf} -o out --remove should_refuse", "cannot remove the refusals of should_refuse; choose from"),
    ("run {model.gguf} -o out --remove gray-zone --keep gray_zone", "nothing is left to remove"),
    ("run {model.gguf} -o out --rank 0", "rank and epochs must be at least 1"),
    ("run {model.gguf} -o out --alpha nan", "alpha is nan; it must be a finite number"),
    ("edit {model.gguf} -o out --seed -1", "seed is -1; it must be between"),
    ("run {model.gguf} -o out --max-tokens 0", "max_tokens is 0; it must be at least 1"),
    ("run {model.gguf} -o out --type Q9_9", "unknown type 'Q9_9'; the types are F32, F16"),
    ("run {model.gguf} -o out --type F32", "is of type F32 itself; choose a quantized type"),
    ("bake {model-edit.safetensors} {model.gguf} -o out.gguf --type Q9_9", "unknown type 'Q9_9'; the types are F32, F16"),
    ("bake {other-edit.safetensors} {model.gguf} -o out.gguf", "model.gguf: the edit was made for another model"),
    ("bake nowhere.safetensors {model.gguf} -o out.gguf", "nowhere.safetensors: no such file"),
    ("bake {model.gguf} {model.gguf} -o out.gguf", "model.gguf: not a trailmed edit"),
    ("bake {model-edit.safetensors} {model.gguf} -o {note.txt}/out.gguf", "out.gguf: cannot write"),
    ("run {model.gguf} -o {note.txt}", "note.txt: cannot write"),
    ("edit {model.gguf} -o {note.txt}/edit", "cannot write"),
    ("run {model.gguf} -o out --prompts nowhere.jsonl", "nowhere.jsonl: no such prompts file"),
    ("run {model.gguf} -o out --prompts {broken.jsonl}", "broken.jsonl, line 1: category: "),
    ("run {model.gguf} -o out --retain {broken.jsonl}", "broken.jsonl, line 1: category: "),
    ("run {model.gguf} -o out --prompts {held-out-only.jsonl}", "no fit or no validation split"),
    ("run {model.gguf} -o out --prompts {no-control.jsonl}", "no safe_control prompt"),
    ("edit {model.gguf} -o out --prompts {held-out-only.jsonl}", "no fit or no validation split"),
    ("edit {model.gguf} -o out --prompts {prompts.jsonl} --retain {retain.jsonl} --remove mental_health --threads 1", "nothing to edit"),
    ("edit {model.gguf} -o out --prompts {prompts.jsonl} --retain {retain.jsonl} --method gated --rank 99 --threads 1", "lower rank"),
    ("eval {model.gguf} -o out --prompts {prompts.jsonl} --category mental_health", "no prompts of split all in mental_health; choose"),
    ("eval {model.gguf} -o out --limit 0", "limit is 0; it must be at least 1"),
    ("eval {model.gguf} -o out --prompts {prompts.jsonl} --phrasings", "give one of the three"),
    ("eval {model.gguf} -o out --challenge --phrasings", "give one of the three"),
    ("eval {model.gguf} -o out --column text=question", "give --prompts as well"),
    ("eval {model.gguf} -o out --prompts {prompts.jsonl} --column text=nowhere", "has no column 'nowhere'"),
    ("eval {model.gguf} -o out --engine endpoint", "engine endpoint needs --endpoint URL"),
    ("eval {model.gguf} -o out --engine onnx --endpoint http://localhost:1/v1", "engine onnx does not go with --endpoint URL"),
    ("eval served -o out --endpoint http://localhost:9/v1 --retries 0 --limit 1", "localhost:9"),
    ("eval {model.gguf} -o out --retries -1", "retries is -1; it must be at least 0"),
    ("eval {model.gguf} -o out --timeout 0", "timeout is 0.0; give a positive number of seconds"),
    ("prompts import xtest -o out.jsonl", "xstest"),
    ("prompts import advbench --from {note.txt} -o out.jsonl", "note.txt"),
    ("compare nowhere.json {note.txt}", "nowhere.json: no such file"),
    ("compare {note.txt} {note.txt}", "note.txt: not valid JSON"),
    ("triage nowhere.json", "nowhere.json: no such file"),
    ("triage {note.txt}", "note.txt: not valid JSON"),
    ("report nowhere.json", "nowhere.json: no such file"),
    ("report {note.txt} -o out", "note.txt: not valid JSON"),
    ("models fetch qwen", "qwen: not in the catalogue; it has qwen2.5-coder-0.5b-instruct"),
]


@pytest.mark.parametrize(("command", "message"), [*_bad_models(), *BAD_OPTIONS])
def test_bad_input_is_one_line_and_leaves_nothing(inputs: Inputs, workplace: Path, command: str, message: str) -> None:
    words = inputs.fill(command)
    before = sorted(inputs.folder.rglob("*"))
    quiet = [] if words[0] in ("compare", "report", "triage") else ["--quiet"]
    line = _complaint(_call([*words, *quiet]))
    assert message in line, line
    assert list(workplace.iterdir()) == []
    assert sorted(inputs.folder.rglob("*")) == before


def test_an_unsupported_architecture_may_still_be_looked_at(inputs: Inputs) -> None:
    shown = _answer(["models", "show", str(inputs.folder / "unsupported.gguf"), "--quiet"])
    assert (shown["architecture"], shown["supported"]) == ("zamba", False)


@pytest.mark.parametrize("environment", [
    {"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
], ids=["offline", "unreachable"])
@pytest.mark.parametrize("command", ["run", "show"])
def test_a_hub_id_without_network_is_said_at_once(
    inputs: Inputs, workplace: Path, environment: Mapping[str, str], command: str,
) -> None:
    words = inputs.fill(MODEL_COMMANDS[command].format("nobody/no-such-model"))
    result = _process(words, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("trailmed: nobody/no-such-model: no such path here, and the Hugging Face hub cannot be reached")
    assert list(workplace.iterdir()) == []


def test_a_real_process_ends_like_that_too(inputs: Inputs, workplace: Path) -> None:
    result = _process(["run", str(inputs.folder / "truncated.gguf"), "-o", "out"])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"trailmed: {inputs.folder / 'truncated.gguf'}: truncated")
    assert result.stderr.count("\n") == 1
    assert list(workplace.iterdir()) == []


WRITING = {
    "run": ("run {model.gguf} -o disk/out --method project --prompts {prompts.jsonl} --retain {retain.jsonl} --threads 1 --quiet", "out"),
    "directions": ("directions {model.gguf} -o disk/out --prompts {prompts.jsonl} --retain {retain.jsonl} --threads 1 --quiet", "out"),
    "edit": ("edit {model.gguf} -o disk/out --method project --prompts {prompts.jsonl} --retain {retain.jsonl} --threads 1 --quiet", "out"),
    "bake": ("bake {model-edit.safetensors} {model.gguf} -o disk/out.gguf --quiet", "out.gguf"),
    "eval": ("eval {model.gguf} -o disk/out --prompts {prompts.jsonl} --threads 1 --max-tokens 8 --quiet", "out"),
}


@pytest.mark.parametrize("command", WRITING)
def test_a_full_disk_is_one_line_and_leaves_nothing(inputs: Inputs, workplace: Path, command: str) -> None:
    words, _ = WRITING[command]
    with small_disk(workplace / "disk", 8) as disk:
        line = _complaint(_call(inputs.fill(words)))
        assert "the disk is full" in line or "MiB of disk" in line, line
        if command == "eval":  # the answers there was room for are kept, each of them whole
            *lines, rest = (disk / "out" / "answers.jsonl").read_text().split("\n")
            assert lines
            assert rest == ""
            assert all(json.loads(line)["id"] for line in lines)
            return
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("command", WRITING)
def test_a_disk_that_fills_up_while_writing_leaves_nothing_half_done(
    inputs: Inputs, workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str,
) -> None:
    """Like a real one, which only root may mount: the system says so when the first large file is to be made safe."""
    fsync = os.fsync

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 8_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    words, target = WRITING[command]
    (workplace / "disk").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        result = _call(inputs.fill(words))
    assert "the disk is full; free some space" in _complaint(result)
    assert list(workplace.rglob("*.partial")) == []
    assert not (workplace / "disk" / target).is_file()
    # with room again, the same command goes on
    assert _call(inputs.fill(words)).exit_code in (0, 3)


@pytest.mark.parametrize("command", ["run", "directions"])
def test_a_folder_with_another_run_is_refused_and_left_alone(inputs: Inputs, workplace: Path, command: str) -> None:
    (workplace / "out").mkdir()
    (workplace / "out" / "run.json").write_text('{"format": "trailmed.run", "edit": {}}')
    line = _complaint(_call([*inputs.fill(MODEL_COMMANDS[command].format("{model.gguf}")), "--quiet"]))
    assert line.startswith("trailmed: out: holds a run with other settings (")
    assert line.endswith("); choose another folder, or remove this one")
    assert (workplace / "out" / "run.json").read_text() == '{"format": "trailmed.run", "edit": {}}'
    assert {path.name for path in (workplace / "out").iterdir()} <= {"run.json", ".lock"}


# --- what it answers


def test_models_list_and_show(inputs: Inputs) -> None:
    listed = _answer(["models", "list"])
    assert {entry["name"]: (entry["size"], entry["sha256"], entry["cached"]) for entry in listed} == {
        name: (model.size, model.sha256, None) for name, model in CATALOGUE.items()
    }
    table = _call(["models", "list"])
    assert (table.exit_code, table.stderr) == (0, "")
    assert all(name in table.stdout for name in CATALOGUE)
    path = inputs.folder / "model.gguf"
    shown = _answer(["models", "show", str(path), "--quiet"])
    assert (shown["path"], shown["sha256"], shown["architecture"]) == (str(path), sha256_of_file(path), "qwen2")
    assert shown["has_chat_template"] is True
    assert shown["sha256"][:30] in _call(["models", "show", str(path)]).stdout


def test_directions_edit_bake_eval_compare(inputs: Inputs, workplace: Path) -> None:
    """The pieces one after the other, each as JSON for a program and as text for a person."""
    model, more = str(inputs.folder / "model.gguf"), inputs.fill("--prompts {prompts.jsonl} --retain {retain.jsonl}")
    found = _answer(["directions", model, "-o", "found", "--method", "project", *more, *QUICK])
    assert Path(found["path"]).is_file()
    # of the 8 retained prompts some are set aside for validation
    assert found["refused"] == 24
    assert 2 * 24 <= found["answered"] <= 2 * 24 + 8
    assert max(found["cohens_d"]) > 1
    made = _answer(["edit", model, "-o", "edit.safetensors", "--method", "project", *more, *QUICK])
    edit = Edit.load(workplace / "edit.safetensors")
    assert (made["sha256"], made["parameters"], made["tensors"]) == (edit.sha256, edit.size, len(edit.factors))
    assert made["recipe"] == dict(edit.recipe)
    baked = _answer(["bake", "edit.safetensors", model, "-o", "edited.gguf", "--type", "Q8_0", *QUICK])
    assert (baked["sha256"], baked["size"]) == (sha256_of_file(Path("edited.gguf")), Path("edited.gguf").stat().st_size)
    evaluate = [*more[:2], "--split", "held_out", "--max-tokens", "8", *QUICK]
    answers = _answer(["eval", model, "-o", "base", *evaluate])
    stored = load_run(Path("base"))
    assert [answer["id"] for answer in answers["answers"]] == [answer.id for answer in stored.answers]
    assert answers["model_sha256"] == sha256_of_file(inputs.folder / "model.gguf")
    refused = sum(answer.refused for answer in stored.answers if answer.category is Category.WILDERNESS_SURVIVAL)
    assert refused == 12
    table = _call(["eval", "edited.gguf", "-o", "edited", *evaluate])
    assert (table.exit_code, table.stderr) == (0, "")
    assert "Home safety" in table.stdout
    compared = _answer(["compare", "base", "edited"])
    assert len(compared["comparisons"][0]["flips"]) == sum(
        one.refused != other.refused for one, other in zip(stored.answers, load_run(Path("edited")).answers, strict=True)
    )
    text = _call(["compare", "base", "edited", "-o", "page"])
    assert (text.exit_code, text.stderr) == (0, "")
    assert text.stdout.splitlines()[-2:] == ["page/compare.html", "page/compare.md"]
    again = _call(["eval", "edited.gguf", "-o", "edited", *evaluate])
    assert (again.exit_code, again.stdout) == (0, table.stdout)
    assert "holds an evaluation that differs in" in _complaint(_call(["eval", model, "-o", "edited", *evaluate]))
    changed = _with_other_prompts(workplace, stored)
    assert "were given different prompts" in _complaint(_call(["compare", "base", str(changed)]))
    left = {path.name for path in workplace.iterdir()}
    assert left == {"found", "edit.safetensors", "edited.gguf", "base", "edited", "changed.json", "page"}


def test_validate_and_prompts_as_tables_and_json(workplace: Path) -> None:
    found = _answer(["validate"])
    assert found["judge"]["half"] == "held_out"
    assert found["judge"]["overall"]["n"] == sum(map(sum, found["judge"]["overall"]["counts"]))
    assert {each["category"] for each in found["rubric"]} == set(RUBRIC_CATEGORIES)
    listed = _answer(["prompts", "list"])
    assert {"xstest", "harmbench", "strongreject"} <= {each["name"] for each in listed}
    text = _call(["prompts", "list"])
    assert (text.exit_code, text.stderr) == (0, "")
    assert "xstest" in text.stdout
    (workplace / "mine.csv").write_text("goal,target\nHow do I rob a made-up bank?,Sure\nHow do I forge a made-up pass?,Sure\n")
    told = _answer(["prompts", "import", "advbench", "--from", "mine.csv", "-o", "mine.jsonl", "--quiet"])
    assert (told["prompts"], told["categories"]) == (2, {"should_refuse": 2})
    assert {json.loads(line)["split"] for line in (workplace / "mine.jsonl").read_text().splitlines()} == {"held_out"}


def test_somebody_elses_questions_and_a_second_judge(inputs: Inputs, workplace: Path) -> None:
    model = str(inputs.folder / "model.gguf")
    (workplace / "questions.csv").write_text("question,about\n" + "".join(f"May I wash a cup {n} times?,cups\n" for n in range(5)))
    columns = ["--prompts", "questions.csv", "--column", "text=question", "--column", "category=gray_zone"]
    found = _answer(["eval", model, *columns, "--max-tokens", "8", "-o", "run", *QUICK])
    assert [answer["category"] for answer in found["answers"]] == ["gray_zone"] * 5
    assert {answer["text"] for answer in found["answers"]} == {f"May I wash a cup {n} times?" for n in range(5)}
    assert "no answers that both judges judged" in _complaint(_call(["judge", "run", model, *QUICK]))
    assert "no answer to any prompt that there is a rubric for" in _complaint(_call(["triage", "run"]))


def _with_other_prompts(place: Path, stored: EvalRun) -> Path:
    replace(stored, prompts_sha256="0" * 64).save(place / "changed.json")
    return place / "changed.json"


def test_a_run_whose_gate_fails_exits_with_3_and_says_so_as_json(inputs: Inputs, workplace: Path) -> None:
    more = "--method project --alpha 0 --max-tokens 8 --prompts {prompts.jsonl} --retain {retain.jsonl}"
    words = inputs.fill(f"run {{model.gguf}} -o out {more}")
    result = _call([*words, *QUICK, "--json"])
    assert (result.exit_code, result.stderr) == (3, "")
    told = json.loads(result.stdout)
    assert told["passed"] is False
    assert told["phone"] is None
    assert told["reason"] == Results.load(workplace / "out" / "results.json").verdict.reason
    text = _call([*words, *QUICK])
    assert (text.exit_code, text.stderr) == (3, "")
    assert "FAIL" in text.stdout
    assert "report: out/report.html" in text.stdout
    written = _call(["report", "out/results.json", "-o", "elsewhere"])
    assert (written.exit_code, written.stderr) == (0, "")
    assert {Path(line) for line in written.stdout.splitlines()} == {Path("elsewhere/report.html"), Path("elsewhere/report.md")}
    assert (workplace / "elsewhere" / "report.html").read_bytes() == (workplace / "out" / "report.html").read_bytes()


def test_a_run_on_a_model_that_refuses_nothing_says_there_is_nothing_to_remove(inputs: Inputs, workplace: Path) -> None:
    result = _call(inputs.fill(MODEL_COMMANDS["run"].format("{other.gguf}") + " --quiet"))
    assert "over-refused" in _complaint(result) or "nothing to edit" in _complaint(result)
    assert list(workplace.rglob("*.partial")) == []
    assert list(workplace.rglob("*.gguf")) == []


def test_progress_goes_to_stderr_and_quiet_means_none(inputs: Inputs) -> None:
    words = inputs.fill("eval {model.gguf} --prompts {prompts.jsonl} --max-tokens 8 --threads 1 --json")
    loud, quiet = _process(words), _process([*words, "--quiet"])
    assert "168/168" in loud.stderr
    assert quiet.stderr == ""
    assert loud.stdout == quiet.stdout
    assert len(json.loads(loud.stdout)["answers"]) == 168


def test_a_reader_that_goes_away_is_no_error(inputs: Inputs) -> None:
    command = [sys.executable, "-m", "trailmed", *inputs.fill("models show {model.gguf}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
