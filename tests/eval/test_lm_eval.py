"""The benchmark in the lm-evaluation-harness: its figures on a real tiny model are the judge's, and harmful answers are not kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from refusing_folder import refusing_answers, refusing_folder

from trailmed.errors import TrailmedError
from trailmed.eval.harness import benchmark_prompts, fills_limit, triage_value
from trailmed.eval.judge import Verdict, judge
from trailmed.eval.lm_eval import task_path
from trailmed.eval.prompts import BENIGN_CATEGORIES, Category
from trailmed.eval.rubric import RUBRIC_CATEGORIES
from trailmed.eval.runs import judge_answer, kept_answer

pytest.importorskip("lm_eval")

LIMIT, MAX_TOKENS, SECRET = 2, 24, "the forty-second word"
QUESTION = "How do I do it?"
HARMFUL = f"Sure, here is how to do it. First take the rope and the boat, then open the window and leave the room. Second, {SECRET}."


def evaluated(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
    """Through the harness's Python front door; no bootstrap, and nothing from a hub."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_path()), include_defaults=False, metadata=options.pop("metadata", None))
    options = {"apply_chat_template": True, "log_samples": True, "bootstrap_iters": 0, "limit": LIMIT, **options}
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)
    assert found is not None
    return found


def canned(says: dict[Category, str]) -> Any:
    """A model of the harness's own kind that says the same to every prompt of a category; its tokens are words."""
    from lm_eval.api.model import LM

    category_of = {prompt.text: prompt.category for prompt in benchmark_prompts()}

    class Canned(LM):
        tokenizer_name = "canned"

        def apply_chat_template(self, chat_history: list[dict[str, str]], **_: Any) -> str:
            return chat_history[-1]["content"]

        def tok_encode(self, text: str, **_: Any) -> list[str]:
            return text.split()

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            answers = [says[category_of[request.args[0]]] for request in requests]
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, answer)
            return answers

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Canned()


def test_command_line_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented command, and its files, against the same model decoded without the harness."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={refusing_folder(tmp_path / 'model')}", "--device", "cpu",
        "--include_path", str(task_path()), "--tasks", "trailmed_triage", "--apply_chat_template", "--metadata", '{"split": "held_out"}',
        "--gen_kwargs", f"max_gen_toks={MAX_TOKENS}", "--limit", str(LIMIT), "--log_samples", "--output_path", "out",
    ])
    cli_evaluate()

    results = json.loads(next(tmp_path.glob("out/*/results_*.json")).read_text())["results"]
    verdicts = []
    for category in Category:
        prompts = benchmark_prompts("held_out", category)[:LIMIT]
        judged = []
        for prompt, (answer, truncated) in zip(prompts, refusing_answers([each.text for each in prompts], MAX_TOKENS), strict=True):
            verdict = judge(answer, truncated=truncated, question=prompt.text).verdict
            judged.append((verdict, triage_value(category, prompt.scenario, prompt.id, answer, verdict), answer))
        found = results[f"trailmed_{category}"]
        for verdict in (Verdict.REFUSAL, Verdict.PARTIAL, Verdict.DEGENERATE):
            assert found[f"{verdict},none"] == pytest.approx(sum(each[0] is verdict for each in judged) / LIMIT), (category, judged)
        if category in RUBRIC_CATEGORIES:
            assert found["triage,none"] == pytest.approx(sum(each[1] or 0 for each in judged) / LIMIT)
        else:
            assert "triage,none" not in found
        samples = [json.loads(line) for line in next(tmp_path.glob(f"out/*/samples_trailmed_{category}_*")).read_text().splitlines()]
        assert [sample["doc"]["id"] for sample in samples] == [prompt.id for prompt in prompts]
        for sample, (verdict, _, answer) in zip(samples, judged, strict=True):
            assert json.loads(sample["filtered_resps"][0])["verdict"] == verdict
            assert sample["resps"] == [[kept_answer(category, verdict, answer)]]
        verdicts += [(category, each[0]) for each in judged]
    benign = [verdict for category, verdict in verdicts if category in BENIGN_CATEGORIES]
    assert results["trailmed_benign"]["refusal,none"] == pytest.approx(benign.count(Verdict.REFUSAL) / len(benign))
    assert len({verdict for _, verdict in verdicts}) > 1  # else the figures above say little


def test_harmful_answers_are_cut_before_the_harness_keeps_them() -> None:
    says = dict.fromkeys(Category, "I'm sorry, but I can't assist with that.")
    found = evaluated(canned({**says, Category.SHOULD_REFUSE: HARMFUL}), ["trailmed_should_refuse", "trailmed_home_safety"])
    assert SECRET not in json.dumps(found, default=str)
    for sample in found["samples"]["trailmed_should_refuse"]:
        assert sample["resps"] == [[HARMFUL[:80]]]
        assert (sample["refusal"], sample["degenerate"]) == (0, 0)
    assert found["results"]["trailmed_should_refuse"]["refusal,none"] == 0
    assert found["results"]["trailmed_home_safety"]["refusal,none"] == 1
    assert found["results"]["trailmed_home_safety"]["triage,none"] == 0
    assert all(sample["resps"] == [[says[Category.HOME_SAFETY]]] for sample in found["samples"]["trailmed_home_safety"])


def test_an_answer_at_the_token_limit_counts_as_cut_off() -> None:
    says = "Sure, here is how to stay safe:"  # 7 words
    for limit, verdict in ((7, Verdict.COMPLIANCE), (96, Verdict.PARTIAL)):
        found = evaluated(
            canned(dict.fromkeys(Category, says)), ["trailmed_home_safety"], limit=1, gen_kwargs={"max_gen_toks": limit},
        )
        assert json.loads(found["samples"]["trailmed_home_safety"][0]["filtered_resps"][0])["verdict"] == verdict


def test_the_judge_is_told_the_question() -> None:
    prompt = benchmark_prompts("all", "home_safety")[0]
    found = evaluated(canned(dict.fromkeys(Category, f"{prompt.text} How can I help you?")), ["trailmed_home_safety"], limit=1)
    [sample] = found["samples"]["trailmed_home_safety"]
    assert (sample["doc"]["id"], sample["partial"]) == (prompt.id, 1)
    assert json.loads(sample["filtered_resps"][0])["reason"] == "only restates the question"


def test_split_of_the_metadata() -> None:
    says = dict.fromkeys(Category, "Stay where you are.")
    found = evaluated(canned(says), ["trailmed_safe_control"], limit=None, metadata={"split": "validation"})
    assert {sample["doc"]["id"] for sample in found["samples"]["trailmed_safe_control"]} == {
        prompt.id for prompt in benchmark_prompts("validation", "safe_control")
    }


def test_runs_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    model = canned(dict.fromkeys(Category, "Stay where you are."))
    with pytest.raises(TrailmedError, match="--apply_chat_template"):
        evaluated(model, ["trailmed_home_safety"], apply_chat_template=False)
    with pytest.raises(TrailmedError, match="--use_cache"):
        evaluated(model, ["trailmed_should_refuse"], use_cache=str(tmp_path / "cache"))
    with pytest.raises(TrailmedError, match="unknown split"):
        evaluated(model, ["trailmed_home_safety"], metadata={"split": "train"})


def test_module_prints_the_folder() -> None:
    printed = subprocess.run([sys.executable, "-m", "trailmed.eval.lm_eval"], capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()) == task_path()
    tasks = {f"trailmed_{name}" for name in ("triage", "benign", *Category)}
    assert {path.stem for path in task_path().glob("*.yaml")} == tasks


def test_judged_answers_and_limits() -> None:
    assert judge_answer(Category.SHOULD_REFUSE, QUESTION, HARMFUL, "eos").answer == HARMFUL[:80]
    assert judge_answer(Category.HOME_SAFETY, QUESTION, HARMFUL, "eos").answer == HARMFUL
    blocked = judge_answer(Category.SHOULD_REFUSE, QUESTION, HARMFUL, "blocked")
    assert (blocked.verdict, blocked.answer) == (Verdict.REFUSAL, HARMFUL[:80])
    assert fills_limit(94, 96)
    assert not fills_limit(80, 96)
    assert fills_limit(24, 24)
    with pytest.raises(TrailmedError, match="unknown category"):
        benchmark_prompts("all", "weather")
    assert {prompt.category for prompt in benchmark_prompts("all", "home-safety, gray_zone")} == {Category.HOME_SAFETY, Category.GRAY_ZONE}
