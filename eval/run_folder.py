"""The folder of an evaluation: which run it is, and one line an answer, each kept as soon as it is finished.

    run.json        what answers, under which settings, and how many prompts it is asked
    answers.jsonl   one judged answer a line, as they finish; in the prompts' order when all are there

An evaluation that was interrupted, even by `kill -9`, goes on in its folder with the prompts that are not answered yet.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import TrailmedError
from ..files import explain_os_error, lock_folder, write_text_atomically
from .document import MAX_DOCUMENT_BYTES, STORED, first_fault, load_document, save_document
from .prompts import Prompt
from .runs import Answer, EvalRun, RunHeader

MANIFEST_NAME = "run.json"
ANSWERS_NAME = "answers.jsonl"
FOLDER_FORMAT = "trailmed.eval-folder"
_LOCK_NAME = ".lock"


@dataclass(frozen=True, slots=True)
class _Manifest:
    __pydantic_config__: ClassVar[ConfigDict] = STORED

    run: RunHeader
    prompts: Annotated[int, Field(ge=1)]
    format: Literal["trailmed.eval-folder"] = "trailmed.eval-folder"
    schema_version: Literal[1] = 1


_MANIFEST: TypeAdapter[_Manifest] = TypeAdapter(_Manifest)
_ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)


class RunFolder:
    """The folder open for writing, locked against other processes; a context manager. `answers`: those it holds, by prompt id."""

    def __init__(self, folder: Path, header: RunHeader, prompts: Sequence[Prompt]) -> None:
        """Open or begin `folder` for the run `header` on `prompts`.

        Raises `TrailmedError` when the folder holds another run or other files, is in use, holds a damaged answer, or cannot be written.
        """
        self.folder = folder
        self.answers: dict[str, Answer] = {}
        self._begun = False
        self._lock = lock_folder(folder, _LOCK_NAME)
        try:
            self._claim(_Manifest(header, len(prompts)))
            self.answers = {answer.id: answer for answer in _read_answers(folder / ANSWERS_NAME)}
            self._check({prompt.id: prompt for prompt in prompts})
            _cut_torn_line(folder / ANSWERS_NAME)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def add(self, answer: Answer) -> None:
        """Keep `answer`: when this returns it is on the disk. Raises `TrailmedError` when it cannot be written."""
        path = self.folder / ANSWERS_NAME
        try:
            with path.open("ab", buffering=0) as file:  # a buffer would be written once more after the truncation
                end, rest = file.tell(), _ANSWER.dump_json(answer) + b"\n"
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(path, end)
                    raise
        except OSError as error:
            raise explain_os_error(error, path) from error
        self.answers[answer.id] = answer

    def finish(self, answers: Sequence[Answer]) -> None:
        """Put the lines into the prompts' order, so that the same run leaves the same bytes however often it was interrupted."""
        write_text_atomically(self.folder / ANSWERS_NAME, "".join(_ANSWER.dump_json(answer).decode() + "\n" for answer in answers))

    def _claim(self, manifest: _Manifest) -> None:
        path = self.folder / MANIFEST_NAME
        if not path.exists():
            others = [entry.name for entry in self.folder.iterdir() if entry.name not in (_LOCK_NAME, f".{MANIFEST_NAME}.partial")]
            if others:
                raise TrailmedError(f"{self.folder}: holds other files ({min(others)[:80]}) and no evaluation; choose another folder")
            save_document(path, manifest, _MANIFEST)
            self._begun = True
        found = load_document(path, _MANIFEST, format=FOLDER_FORMAT, schema_version=1)
        if found != manifest:
            differing = [
                entry.name for entry in fields(RunHeader) if getattr(found.run, entry.name) != getattr(manifest.run, entry.name)
            ] or ["prompts"]
            raise TrailmedError(
                f"{self.folder}: holds an evaluation that differs in {', '.join(differing)}; choose another folder, or remove this one"
            )

    def _check(self, prompts: dict[str, Prompt]) -> None:
        for answer in self.answers.values():
            prompt = prompts.get(answer.id)
            if prompt is None or (prompt.text, prompt.category) != (answer.text, answer.category):
                raise TrailmedError(f"{self.folder / ANSWERS_NAME}: answers prompt {answer.id}, which was not asked; choose another folder")

    def _release(self) -> None:
        self._lock.release()
        nothing = [] if self.answers else [MANIFEST_NAME, ANSWERS_NAME]  # a folder without answers would only refuse the next run
        for name in [_LOCK_NAME, *(nothing if self._begun else ())]:
            with suppress(OSError):
                (self.folder / name).unlink()
        with suppress(OSError):
            self.folder.rmdir()  # only if nothing of the run was written


def load_run(path: Path) -> EvalRun:
    """Read a finished run from its folder, or from a file that `EvalRun.save` wrote.

    Raises `TrailmedError` when there is none, it is damaged, or not all prompts are answered yet.
    """
    if not path.is_dir():
        return EvalRun.load(path)
    manifest = load_document(path / MANIFEST_NAME, _MANIFEST, format=FOLDER_FORMAT, schema_version=1)
    answers = _read_answers(path / ANSWERS_NAME)
    if len(answers) < manifest.prompts:
        raise TrailmedError(
            f"{path}: only {len(answers)} of {manifest.prompts} prompts are answered; give the same `trailmed eval` again to finish it"
        )
    try:
        return EvalRun.of(manifest.run, answers)
    except ValueError as error:
        raise TrailmedError(f"{path / ANSWERS_NAME}: {error}; evaluate anew") from error


def _read_answers(path: Path) -> list[Answer]:
    """The answers of every whole line; what stands behind the last line's end was torn off by a crash and is left out."""
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise TrailmedError(f"{path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB; not a file that trailmed wrote")
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    answers: dict[str, Answer] = {}
    for number, line in enumerate(lines, start=1):
        try:
            answer = _ANSWER.validate_json(line)
        except ValidationError as error:
            raise TrailmedError(f"{path}, line {number}: {first_fault(error)}; remove the line, and evaluate again") from error
        if answer.id in answers:
            raise TrailmedError(f"{path}, line {number}: prompt {answer.id} is answered twice; remove the line, and evaluate again")
        answers[answer.id] = answer
    return list(answers.values())


def _cut_torn_line(path: Path) -> None:
    try:
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise explain_os_error(error, path) from error
