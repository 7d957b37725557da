"""`trailmed run` in a process that kills itself, with SIGKILL, at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import get_context
from pathlib import Path

from trailmed.pipeline import run
from trailmed.settings import RunSettings

_FORKSERVER = get_context("forkserver")


def run_until(model: str, out: Path, settings: RunSettings, target: str | None, *, after: bool, record: Path | None = None) -> int | None:
    """Run in a process that dies right before (or after) it renames a finished file to `out / target`; returns its exit code.

    Every file of a run becomes visible by such a rename, so these are all the moments that matter. `record` is written with the
    names of all targets, in order. The processes are forked from one that has imported everything.
    """
    _FORKSERVER.set_forkserver_preload(["trailmed.pipeline"])
    process = _FORKSERVER.Process(target=_run, args=(model, out, settings, target, after, record))
    process.start()
    process.join()
    return process.exitcode


def _run(model: str, out: Path, settings: RunSettings, target: str | None, after: bool, record: Path | None) -> None:
    renamed: list[str] = []
    replace = Path.replace

    def replace_and_die(self: Path, to: Path) -> Path:
        name = str(Path(to).relative_to(out))
        renamed.append(name)
        if name == target and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(self, to)
        if name == target:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace_and_die  # type: ignore[assignment, method-assign]
    run(model, out, settings, progress=False)
    if record is not None:
        record.write_text(json.dumps(renamed))
