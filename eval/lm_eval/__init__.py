"""The benchmark as tasks of EleutherAI's lm-evaluation-harness: `lm_eval --include_path "$(python -m trailmed.eval.lm_eval)" …`.

The folder holds the harness's task files; `scoring` is what they call. See `scoring` for how to run them.
"""

from __future__ import annotations

from pathlib import Path


def task_path() -> Path:
    """The folder of the task files, for lm_eval's `--include_path` or `TaskManager(include_path=…)`."""
    return Path(__file__).parent
