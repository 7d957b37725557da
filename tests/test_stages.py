"""Stages: done once, done again when their outputs are not what they were, and one process at a time in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trailmed import files
from trailmed.errors import TrailmedError
from trailmed.stages import Stages, StageTime

SETTINGS: dict[str, Any] = {"format": "test", "seed": 1, "edit": {"rank": 4, "remove": ["a", "b"]}}
HOLDER = """
import sys
from pathlib import Path
from trailmed.stages import Stages
with Stages(Path(sys.argv[1]), {"format": "test"}, total=1, progress=False):
    print("open", flush=True)
    sys.stdin.read()
"""


class Job:
    """Two stages in a folder; `done` lists those that were really done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, list[str]()
        self.first, self.second = folder / "first.txt", folder / "deep" / "second.txt"

    def run(self, settings: dict[str, Any] = SETTINGS) -> tuple[StageTime, ...]:
        """Both stages; the second writes what the first wrote, twice."""
        with Stages(self.folder, settings, total=2, progress=False) as stages:
            stages.run("the first", [self.first], self._stage("the first", lambda: self._write(self.first, "one")))
            stages.run("second", [self.second], self._stage("second", lambda: self._write(self.second, self.first.read_text() * 2)))
            return stages.times(["the first", "second"])

    def _stage(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        def run_stage() -> None:
            self.done.append(name)
            work()
        return run_stage

    @staticmethod
    def _write(path: Path, text: str) -> None:
        files.write_text_atomically(path, text)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "run")


def test_stages_run_in_order_and_are_skipped_when_done(job: Job) -> None:
    first = job.run()
    stamps = {path: path.stat().st_mtime_ns for path in (job.folder / "stages").iterdir()}
    assert job.done == ["the first", "second"]
    assert job.second.read_text() == "oneone"
    assert [time.name for time in first] == job.done
    assert all(time.seconds >= 0 and time.peak_rss_bytes > 1_000_000 for time in first)
    assert len(stamps) == 2
    again = Job(job.folder)
    # what they took when they were done is told again
    assert again.run() == first
    assert again.done == []
    assert {path: path.stat().st_mtime_ns for path in (job.folder / "stages").iterdir()} == stamps


@pytest.mark.parametrize(("spoil", "redone"), [
    (lambda job: job.first.write_text("two"), ["the first"]),
    (lambda job: job.first.unlink(), ["the first"]),
    (lambda job: job.second.write_text(""), ["second"]),
    (lambda job: (job.second.unlink(), job.second.mkdir(), job.second.rmdir()), ["second"]),
    (lambda job: (job.folder / "stages" / "the first.json").unlink(), ["the first"]),
    (lambda job: (job.folder / "stages" / "the first.json").write_text('{"outputs": {'), ["the first"]),
    (lambda job: (job.folder / "stages" / "second.json").write_text('{"outputs": {}, "seconds": 1}'), ["second"]),
    (lambda job: (job.folder / "stages" / "second.json").write_text(
        '{"outputs": {"deep/second.txt": "b"}, "seconds": 1, "peak_rss_bytes": 1}'), ["second"]),
    (lambda job: (job.first.unlink(), job.second.unlink()), ["the first", "second"]),
])
def test_a_stage_whose_output_is_not_what_it_wrote_is_done_again(job: Job, spoil: Callable[[Job], object], redone: list[str]) -> None:
    job.run()
    job.done.clear()
    spoil(job)
    job.run()
    assert job.done == redone
    assert (job.first.read_text(), job.second.read_text()) == ("one", "oneone")


def test_a_stage_that_fails_leaves_no_stamp_and_those_before_stay_done(job: Job) -> None:
    job.run()
    job.second.unlink()
    job.done.clear()

    def fail(_path: Path, _text: str) -> None:
        raise TrailmedError("a bad day")

    job._write = fail  # type: ignore[method-assign]
    with pytest.raises(TrailmedError, match="a bad day"):
        job.run()
    assert job.done == ["second"]
    again = Job(job.folder)  # and the lock was given back
    again.run()
    assert again.done == ["second"]


def test_is_done_looks_at_the_outputs(job: Job) -> None:
    job.run()
    with Stages(job.folder, SETTINGS, total=2, progress=False) as stages:
        assert stages.is_done("the first")
        assert not stages.is_done("third")
        job.first.write_text("two")
        assert not stages.is_done("the first")


@pytest.mark.parametrize(("changed", "named"), [
    ({"seed": 2}, "seed"), ({"edit": {"rank": 8, "remove": ["a", "b"]}}, "edit"), ({"more": 1, "seed": 3}, "more, seed"),
    ({"format": "other"}, "format"),
])
def test_a_folder_with_other_settings_is_refused_and_left_alone(job: Job, changed: dict[str, Any], named: str) -> None:
    job.run()
    before = {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.name != ".lock"}
    with pytest.raises(TrailmedError, match=rf"^{job.folder}: holds a run with other settings \({named}\); choose another") as caught:
        job.run(SETTINGS | changed)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in job.folder.rglob("*") if path.name != ".lock"} == before
    job.run()  # the refusal gave the lock back


def test_settings_are_compared_as_json(job: Job) -> None:
    job.run()
    job.done.clear()
    job.run(json.loads(json.dumps(SETTINGS)))
    assert job.done == []


@pytest.mark.parametrize("content", ["[]", "{", '"a"'])
def test_a_damaged_manifest_is_one_line(job: Job, content: str) -> None:
    job.run()
    (job.folder / "run.json").write_text(content)
    with pytest.raises(TrailmedError, match=f"^{job.folder}") as caught:
        job.run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", ["results.json", "stages"])
def test_somebody_elses_results_are_not_taken_over(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(TrailmedError, match=r"holds results but no run\.json; choose another folder"):
        Stages(tmp_path, SETTINGS, total=1, progress=False)
    assert not (tmp_path / "run.json").exists()


def test_a_folder_in_use_by_another_process_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(TrailmedError, match=f"^{tmp_path / 'run'}: another trailmed process works in it; wait for it"):
            Stages(tmp_path / "run", {"format": "test"}, total=1, progress=False)
        # SIGKILL gives nobody the time to unlock; the lock must not outlive its process
        holder.kill()
    with Stages(tmp_path / "run", {"format": "test"}, total=1, progress=False):
        pass


def test_orphans_of_a_killed_process_are_removed(job: Job) -> None:
    job.run()
    orphans = [job.folder / f".a{files.PARTIAL_SUFFIX}", job.folder / "deep" / f".second.txt{files.PARTIAL_SUFFIX}"]
    kept = [job.folder / f"mine{files.PARTIAL_SUFFIX}", job.folder / ".notes"]
    for path in (*orphans, *kept):
        path.write_text("half")
    job.run()
    assert not any(path.exists() for path in orphans)
    assert all(path.exists() for path in kept)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrailmedError, match=rf"^{folder}: cannot write \(.*\); choose another folder"):
            Stages(folder, SETTINGS, total=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_headings_go_to_stderr_and_only_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (True, True, False):
        with Stages(tmp_path, SETTINGS, total=3, progress=progress) as stages:
            stages.run("write it", [tmp_path / "out"], lambda: files.write_text_atomically(tmp_path / "out", "x"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["[1/3] write it", "[1/3] write it: already done"]


def test_outputs_may_depend_on_the_work(tmp_path: Path) -> None:
    made: list[Path] = []

    def work() -> None:
        made.append(tmp_path / "made.txt")
        files.write_text_atomically(made[0], "x")

    with Stages(tmp_path, SETTINGS, total=1, progress=False) as stages:
        stages.run("make", lambda: made, work)
        assert stages.is_done("make")
        made[0].unlink()
        assert not stages.is_done("make")


def test_times_are_told_even_when_the_outputs_are_gone(job: Job) -> None:
    first, second = job.run()
    job.second.unlink()
    (job.folder / "stages" / "the first.json").unlink()
    with Stages(job.folder, SETTINGS, total=2, progress=False) as stages:
        assert stages.times(["the first", "second", "third"]) == (second,)
    assert first.name == "the first"


def test_bad_input_before_anything_is_finished_leaves_no_folder(tmp_path: Path) -> None:
    """So that the corrected command may use it."""
    def fail() -> None:
        (tmp_path / "run" / "work").mkdir()
        (tmp_path / "run" / "work" / "half.gguf").write_text("half")
        raise TrailmedError("bad input")

    with pytest.raises(TrailmedError, match="bad input"), Stages(tmp_path / "run", SETTINGS, total=1, progress=False) as stages:
        stages.run("fail", [], fail)
    assert list(tmp_path.iterdir()) == []
    Job(tmp_path / "run").run(SETTINGS | {"seed": 2})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_anything_else_that_stops_a_job_leaves_it_to_go_on(job: Job, error: BaseException) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(type(error)), Stages(job.folder, SETTINGS, total=2, progress=False) as stages:
        stages.run("the first", [job.first], stop)
    with pytest.raises(TrailmedError, match="other settings"):
        job.run(SETTINGS | {"seed": 2})
    job.run()
    assert job.done == ["the first", "second"]


def test_somebody_elses_file_survives_our_failure(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrailmedError, match="bad input"), Stages(tmp_path, SETTINGS, total=1, progress=False):
        raise TrailmedError("bad input")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
