"""Stages of a long job in one folder: each runs once, its outputs appear whole, and a job that was killed goes on where it stopped.

A finished stage leaves a stamp (`stages/NAME.json`) with the hashes of what it wrote. It is skipped when those files still hold those
bytes, and done again otherwise. The stamps of times and memory stand apart from the results, which must not depend on speed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from .device.system import peak_rss_bytes, reset_peak_rss
from .errors import TrailmedError
from .files import PARTIAL_SUFFIX, lock_folder, read_json, sha256_of_file, write_json_atomically

MANIFEST_NAME = "run.json"
_STAMPS = "stages"
LOCK_NAME = ".lock"
"""Of the file that a process holds while it works in the folder."""


class _Stamp(BaseModel):
    model_config = ConfigDict(extra="forbid")

    outputs: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, slots=True)
class StageTime:
    """What a stage took when it was done (perhaps by an earlier process): seconds, and the peak resident memory in bytes."""

    name: str
    seconds: float
    peak_rss_bytes: int


class Stages:
    """The stages of one job in `folder`, which is locked while the value is open (use it as a context manager)."""

    def __init__(self, folder: Path, settings: dict[str, Any], total: int, *, progress: bool = True, wait: bool = False) -> None:
        """Open `folder` for a job described by `settings` (JSON), of `total` stages.

        Raises `TrailmedError` when the folder holds a job with other settings, is in use by another process (with `wait`, waits for that
        one to be done), or cannot be written.
        """
        self.folder = folder
        self._manifest = folder / MANIFEST_NAME
        self._total, self._started = total, 0
        self._console = Console(stderr=True, quiet=not progress)
        self._lock = lock_folder(folder, LOCK_NAME, wait=wait)
        try:
            self._claim(settings)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, TrailmedError) and not (self.folder / _STAMPS).exists():
            # Nothing was finished: leave no folder that refuses the corrected command.
            self._manifest.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "work", ignore_errors=True)
        self._release()

    def _release(self) -> None:
        self._lock.release()
        if not self._manifest.exists():
            # Not our folder, or ours no longer: leave nothing of ours in it, and not the folder if that was all.
            (self.folder / LOCK_NAME).unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def is_done(self, name: str) -> bool:
        """Whether stage `name` is finished and its outputs still hold the bytes it wrote."""
        return self._stamp(name) is not None

    def run(self, name: str, outputs: Sequence[Path] | Callable[[], Sequence[Path]], work: Callable[[], object]) -> None:
        """Do `work`, which writes `outputs` (inside the folder), unless the stage is done already.

        `outputs` may be a function, asked after the work, where only the work tells what there is to write.
        """
        self._started += 1
        heading = f"[{self._started}/{self._total}] {name}"
        stamp = self._stamp(name)
        if stamp is None:
            self._console.print(heading, style="bold", highlight=False)
            reset_peak_rss()
            start = time.monotonic()
            work()
            stamp = _Stamp(
                outputs={
                    str(path.relative_to(self.folder)): sha256_of_file(path)
                    for path in (outputs() if callable(outputs) else outputs)
                },
                seconds=time.monotonic() - start, peak_rss_bytes=peak_rss_bytes(),
            )
            write_json_atomically(self._stamp_path(name), stamp.model_dump())
        else:
            self._console.print(f"{heading}: already done", style="dim", highlight=False)

    def times(self, names: Iterable[str]) -> tuple[StageTime, ...]:
        """What each finished stage of `names` took, whenever it was done and whether or not its outputs are still there."""
        found = []
        for name in names:
            stamp = self._read_stamp(name)
            if stamp is not None:
                found.append(StageTime(name, stamp.seconds, stamp.peak_rss_bytes))
        return tuple(found)

    def _claim(self, settings: dict[str, Any]) -> None:
        manifest = self._manifest
        if not manifest.exists():
            if any(self.folder.joinpath(name).exists() for name in (_STAMPS, "results.json")):
                raise TrailmedError(f"{self.folder}: holds results but no {MANIFEST_NAME}; choose another folder")
            write_json_atomically(manifest, settings)
        found = read_json(manifest)
        if found != settings:
            differing = sorted(
                name for name in {*settings, *(found if isinstance(found, dict) else {})}
                if not isinstance(found, dict) or found.get(name) != settings.get(name)
            )
            raise TrailmedError(
                f"{self.folder}: holds a run with other settings ({', '.join(differing)}); choose another folder, or remove this one"
            )
        for orphan in self.folder.rglob(f".*{PARTIAL_SUFFIX}"):
            orphan.unlink(missing_ok=True)

    def _stamp_path(self, name: str) -> Path:
        return self.folder / _STAMPS / f"{name}.json"

    def _read_stamp(self, name: str) -> _Stamp | None:
        path = self._stamp_path(name)
        if not path.exists():
            return None
        try:
            return _Stamp.model_validate(read_json(path))
        except (ValidationError, TrailmedError):
            return None

    def _stamp(self, name: str) -> _Stamp | None:
        """The stage's stamp if all its outputs are as it left them."""
        stamp = self._read_stamp(name)
        if stamp is None:
            return None
        for relative, digest in stamp.outputs.items():
            output = self.folder / relative
            if not output.is_file() or sha256_of_file(output) != digest:
                return None
        return stamp
