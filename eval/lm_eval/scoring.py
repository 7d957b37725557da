"""What the task files of this folder call: prompts, judged answers, figures.

    lm_eval --model hf --model_args pretrained=FOLDER --include_path "$(python -m trailmed.eval.lm_eval)" \
        --tasks trailmed_triage --apply_chat_template

`trailmed_triage` is the whole benchmark, `trailmed_benign` its six benign categories with means over their prompts, and each category is
a task (`trailmed_home_safety`, …); `--metadata '{"split": "held_out"}'` asks the prompts of one split only. `refusal`, `partial` and
`degenerate` are shares of the answers; `triage` is 0 to 100, where there is a rubric.

The harness keeps answers whole. So they are judged, and harmful ones cut, before it makes its samples of them (`TriageTask`), and a run
with `--use_cache`, which would file them as they come, is refused. So is one without a chat template: it would measure another question.
"""

# mypy: disallow-subclassing-any=False

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from ...device.engine import Stopped
from ...errors import TrailmedError
from ..harness import benchmark_prompts, fills_limit, triage_value
from ..judge import Verdict
from ..prompts import Category
from ..runs import judge_answer

_SHARES = (Verdict.REFUSAL, Verdict.PARTIAL, Verdict.DEGENERATE)


class TriageTask(ConfigurableTask):
    """A task whose answers are judged with what stopped them in view, and kept as far as they may be."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        self._model: Any = None

    def build_all_requests(self, *, apply_chat_template: bool = False, chat_template: Any = None, **options: Any) -> None:
        """As the harness's own. Raises `TrailmedError` for a run without chat template, and for one that caches answers."""
        if not apply_chat_template:
            raise TrailmedError(f"{self.config.task} asks a chat model; run lm_eval with --apply_chat_template")
        self._model = getattr(chat_template, "__self__", None)
        if getattr(getattr(self._model, "cache_hook", None), "dbdict", None) is not None:
            raise TrailmedError(f"{self.config.task} keeps harmful answers out of files, and a cache holds them; leave --use_cache out")
        super().build_all_requests(apply_chat_template=apply_chat_template, chat_template=chat_template, **options)

    def apply_filters(self) -> None:
        """Judge every answer. What is left of it stands in its place, and the judgement, as JSON, where filtered answers are expected."""
        for instance in self.instances:
            category = Category(instance.doc["category"])
            judged = [judge_answer(category, instance.doc["text"], each, self._stopped(each, instance.args[1])) for each in instance.resps]
            instance.resps = [each.answer for each in judged]
            first = judged[0]
            instance.filtered_resps["none"] = json.dumps({"verdict": first.verdict, "reason": first.reason, "answer": first.answer})

    def _stopped(self, answer: str, settings: Mapping[str, Any]) -> Stopped:
        """The harness does not say what ended an answer; where the model has its tokenizer here, the length does."""
        count = getattr(self._model, "tok_encode", None)
        full = count is not None and fills_limit(len(count(answer, add_special_tokens=False)), int(settings["max_gen_toks"]))
        return "length" if full else "eos"


def dataset(category: str, split: str = "all", **_: Any) -> dict[str, datasets.Dataset]:
    """The prompts of a category, as the harness's documents. The harness passes all metadata of the task, its own included."""
    prompts = benchmark_prompts(split, category)
    records = [
        {"id": each.id, "category": each.category.value, "scenario": each.scenario, "voice": each.voice, "split": str(each.split),
         "expected": each.expected.value, "text": each.text}
        for each in prompts
    ]
    return {"test": datasets.Dataset.from_list(records)}


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """The figures of one judged answer."""
    judged = json.loads(results[0])
    verdict = Verdict(judged["verdict"])
    figures = {each.value: float(verdict is each) for each in _SHARES}
    triage = triage_value(Category(doc["category"]), doc["scenario"], doc["id"], judged["answer"], verdict)
    return figures if triage is None else {**figures, "triage": triage}
