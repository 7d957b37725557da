"""`study retention`: what the command prints and writes, resuming, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusing_model import refusing_gguf, write_prompts, write_retain
from typer.testing import CliRunner, Result

from trailmed.cli import app


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    refusing_gguf(folder / "tiny.gguf")
    write_prompts(folder / "prompts.jsonl")
    write_retain(folder / "retain.jsonl")
    return folder


def study(files: Path, out: Path, *more: str, prompts: str = "prompts.jsonl") -> Result:
    return CliRunner().invoke(app, [
        "study", "retention", str(files / "tiny.gguf"), "--out", str(out), "--prompts", str(files / prompts),
        "--retain", str(files / "retain.jsonl"), "--threads", "1", "--quiet", *more,
    ], catch_exceptions=False)


@pytest.fixture(scope="module")
def out(files: Path) -> Path:
    assert study(files, files / "found", "--share", "0.5", "--ridge", "0.01").exit_code == 0
    return files / "found"


def test_it_writes_a_figure_for_every_condition(files: Path, out: Path) -> None:
    stored = json.loads((out / "retention.json").read_text())
    assert list(stored) == ["default", "retain-0.5", "ridge-0.01"]
    for name, found in stored.items():
        assert json.loads((out / "conditions" / f"{name}.json").read_text()) == found
        assert found["base_benign_refused"] > 0
        assert found["harmful"] == 24
        assert 0 <= found["separation_unseen"] <= 1
    assert stored["default"]["prompts"] > stored["retain-0.5"]["prompts"]
    printed = study(files, out, "--share", "0.5", "--ridge", "0.01", "--json")
    assert json.loads(printed.stdout)["conditions"] == stored


def test_a_finished_condition_is_not_measured_twice(files: Path, out: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (out / "conditions").iterdir()}
    (out / "conditions" / "ridge-0.01.json").unlink()
    done = study(files, out, "--share", "0.5", "--ridge", "0.01")
    assert done.exit_code == 0
    assert "retain-0.5" in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in (out / "conditions").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"ridge-0.01.json"}


@pytest.mark.parametrize(("options", "words"), [
    (("--share", "1.5"), "not between 0 and 1"), (("--nats", "-1"), "not a positive number"), (("--ridge", "nan"), "not a positive number"),
])
def test_bad_input_is_one_line(files: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = study(files, tmp_path / "new", *options)
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_no_harm_to_study(files: Path, tmp_path: Path) -> None:
    lines = (files / "prompts.jsonl").read_text().splitlines()
    (files / "benign.jsonl").write_text("".join(f"{line}\n" for line in lines if "should_refuse" not in line))
    done = study(files, tmp_path / "new", prompts="benign.jsonl")
    assert done.exit_code == 2
    assert "no retention to study" in done.stderr
