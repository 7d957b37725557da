"""`python -m trailmed.eval.lm_eval` prints the folder that lm_eval's `--include_path` wants."""

from . import task_path

print(task_path())
