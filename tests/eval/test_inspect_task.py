"""The benchmark in Inspect AI: its figures on a real tiny model are the judge's, and nothing that Inspect keeps holds a harmful answer."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusing_folder import refusing_folder

from trailmed.eval.harness import benchmark_prompts, triage_value
from trailmed.eval.judge import Verdict, judge
from trailmed.eval.prompts import BENIGN_CATEGORIES, Category, Prompt
from trailmed.eval.rubric import RUBRIC_CATEGORIES
from trailmed.eval.runs import kept_answer

pytest.importorskip("inspect_ai")

SECRET = "the forty-second word"
HARMFUL = f"Sure, here is how to do it. First take the rope and the boat, then open the window and leave the room. Second, {SECRET}."
REFUSES = "I'm sorry, but I can't assist with that."


def few(per_category: int = 2) -> list[Prompt]:
    return [prompt for category in Category for prompt in benchmark_prompts("held_out", category)[:per_category]]


def evaluated(tmp_path: Path, model: Any, prompts: list[Prompt], task: Any = "trailmed/trailmed_triage", **options: Any) -> Any:
    """The log of a run on some prompts; by name, as a user would, through the entry point."""
    from inspect_ai import eval

    # one format that can be searched as text, and its usual one
    options = {"display": "none", "log_dir": str(tmp_path / "logs"), "log_format": "json", "log_model_api": True, **options}
    [log] = eval(task, model=model, sample_id=[prompt.id for prompt in prompts], **options)
    return log


def canned(says: Callable[[Prompt], Any]) -> Any:
    """A model of Inspect's own kind that answers each prompt with the output, or its text, that `says` gives."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    asked = {prompt.text: prompt for prompt in benchmark_prompts()}

    def answer(input: Any, *_: Any) -> Any:
        said = says(asked[next(message.text for message in input if message.role == "user")])
        output = ModelOutput.from_content("canned", said) if isinstance(said, str) else said
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # else Inspect fetches a tokenizer to count with
        return output

    return get_model("mockllm/model", custom_outputs=answer, memoize=False)


def kept_text(tmp_path: Path) -> str:
    """All that is in the logs, in either format."""
    found = []
    for path in (tmp_path / "logs").rglob("*"):
        if path.suffix == ".eval":
            with zipfile.ZipFile(path) as archive:
                found += [archive.read(name).decode() for name in archive.namelist()]
        elif path.is_file():
            found.append(path.read_text(encoding="utf-8"))
    assert found
    return "".join(found)


def figures(log: Any, score: str) -> dict[str, float]:
    return next({name: metric.value for name, metric in each.metrics.items()} for each in log.results.scores if each.name == score)


def test_figures_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the `hf` provider, whose own outputs are noted before the task sees them."""
    from inspect_ai.model._providers.hf import HuggingFaceAPI

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else Inspect looks "tiny" up there
    raw: dict[str, str] = {}
    generate = HuggingFaceAPI.generate

    async def noted(self: Any, input: Any, **options: Any) -> Any:
        output = await generate(self, input, **options)
        raw[input[-1].text] = output.completion
        return output

    monkeypatch.setattr(HuggingFaceAPI, "generate", noted)
    prompts = few()
    log = evaluated(
        tmp_path, "hf/tiny", prompts, task_args={"split": "held_out", "max_tokens": 12},
        model_args={
            "model_path": str(refusing_folder(tmp_path / "model")), "do_sample": False, "device": "cpu",
            "tokenizer_call_args": {"add_special_tokens": False},
        },
    )
    assert log.status == "success"
    samples = {sample.id: sample for sample in log.samples}
    judged: list[tuple[Prompt, Verdict, float | None]] = []
    for prompt in prompts:
        sample, answer = samples[prompt.id], raw[prompt.text]
        stopped = sample.output.metadata["trailmed"]["stopped"]
        judgement = judge(answer, truncated=stopped == "length", question=prompt.text)
        triage = triage_value(prompt.category, prompt.scenario, prompt.id, answer, judgement.verdict)
        judged.append((prompt, judgement.verdict, triage))
        assert sample.scores["refusal"].explanation == f"{judgement.verdict}: {judgement.reason}"
        assert sample.scores["refusal"].answer == sample.output.completion == kept_answer(prompt.category, judgement.verdict, answer)
        assert ("triage" in sample.scores) == (prompt.category in RUBRIC_CATEGORIES) == (triage is not None)
    assert len({verdict for _, verdict, _ in judged}) > 1  # else the figures say little
    assert {sample.output.metadata["trailmed"]["stopped"] for sample in log.samples} == {"eos", "length"}

    for verdict in (Verdict.REFUSAL, Verdict.PARTIAL, Verdict.DEGENERATE):
        found = figures(log, verdict)
        for category in Category:
            members = [each is verdict for prompt, each, _ in judged if prompt.category is category]
            assert found[category] == pytest.approx(sum(members) / len(members))
        members = [each is verdict for prompt, each, _ in judged if prompt.category in BENIGN_CATEGORIES]
        assert found["benign"] == pytest.approx(sum(members) / len(members))
    scores = [triage for _, _, triage in judged if triage is not None]
    assert figures(log, "triage")["mean"] == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize("log_format", ["json", "eval"])
def test_harmful_answers_are_cut_before_inspect_keeps_them(tmp_path: Path, log_format: str) -> None:
    """Not in the log, nor in any event on its way there, raw API calls, thoughts, further choices and log-probabilities included."""
    from inspect_ai.hooks import Hooks, SampleEvent, hooks
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ContentReasoning, ContentText, Logprob, Logprobs, ModelOutput

    events: list[str] = []

    @hooks(name=f"listener_{log_format}", description="keeps what passes by")
    class Listener(Hooks):
        async def on_sample_event(self, data: SampleEvent) -> None:
            events.append(data.event.model_dump_json())

    def says(prompt: Prompt) -> Any:
        if prompt.category is not Category.SHOULD_REFUSE:
            return REFUSES
        message = ChatMessageAssistant(content=[ContentReasoning(reasoning=SECRET), ContentText(text=HARMFUL)])
        told = ChatCompletionChoice(message=message, logprobs=Logprobs(content=[Logprob(token=SECRET, logprob=0.0)]), stop_reason="stop")
        other = ChatCompletionChoice(message=ChatMessageAssistant(content=HARMFUL), stop_reason="stop")
        return ModelOutput(model="canned", choices=[told, other], metadata={"hidden": SECRET})

    prompts = few()
    log = evaluated(tmp_path, canned(says), prompts, log_format=log_format)
    assert log.status == "success"
    assert figures(log, "refusal")["should_refuse"] == 0
    assert figures(log, "refusal")["benign"] == 1
    assert figures(log, "triage")["mean"] == 0
    for sample in log.samples:
        if sample.metadata["category"] == Category.SHOULD_REFUSE:
            assert sample.output.completion == sample.messages[-1].text == sample.scores["refusal"].answer == HARMFUL[:80]
    assert any(HARMFUL[:80] in event for event in events)
    assert SECRET not in "".join(events)
    assert HARMFUL[:80] in kept_text(tmp_path)
    assert SECRET not in kept_text(tmp_path)
    assert SECRET not in repr(log)


def test_a_solver_of_the_users_own_keeps_the_guard(tmp_path: Path) -> None:
    from inspect_ai.solver import chain, generate, system_message, user_message

    prompts = benchmark_prompts("held_out", "should_refuse")[:2]
    solver = chain(system_message("Be kind."), generate(), user_message("Go on."), generate())
    log = evaluated(tmp_path, canned(lambda _: HARMFUL), prompts, solver=solver)
    assert log.status == "success"
    assert figures(log, "refusal") == {"should_refuse": 0, "should_refuse_stderr": 0}
    assert [message.text for message in log.samples[0].messages if message.role == "assistant"] == [HARMFUL[:80]] * 2
    assert SECRET not in kept_text(tmp_path)


def test_an_unguarded_harmful_answer_is_not_scored(tmp_path: Path) -> None:
    from inspect_ai.solver import Generate, TaskState, solver

    @solver
    def other_model() -> Any:
        async def solve(state: TaskState, _generate: Generate) -> TaskState:
            state.output = await canned(lambda _: REFUSES).generate(state.input_text)
            return state

        return solve

    prompts = benchmark_prompts("held_out", "should_refuse")[:1]
    log = evaluated(tmp_path, canned(lambda _: REFUSES), prompts, solver=other_model())
    assert log.status == "error"
    assert "did not pass the task's guard" in log.error.message


def test_a_refused_harmful_request_is_kept_whole_and_a_filter_refuses(tmp_path: Path) -> None:
    from inspect_ai.model import ModelOutput

    first, second = benchmark_prompts("held_out", "should_refuse")[:2]
    refuses = "I can't help with that. " * 8

    def says(prompt: Prompt) -> Any:
        return refuses if prompt.id == first.id else ModelOutput.from_content("canned", HARMFUL, stop_reason="content_filter")

    log = evaluated(tmp_path, canned(says), [first, second])
    assert figures(log, "refusal")["should_refuse"] == 1
    kept = {sample.id: sample.scores["refusal"] for sample in log.samples}
    assert kept[first.id].answer.strip() == refuses.strip()
    assert kept[second.id].answer == HARMFUL[:80]
    assert "filter" in kept[second.id].explanation


def test_a_log_can_be_scored_again(tmp_path: Path) -> None:
    from inspect_ai import score

    from trailmed.eval.inspect_task import refusal

    prompts = few(1)
    log = evaluated(tmp_path, canned(lambda prompt: HARMFUL if prompt.category is Category.SHOULD_REFUSE else REFUSES), prompts)
    assert figures(score(log, refusal(), action="overwrite", display="none"), "refusal") == figures(log, "refusal")


def test_the_judge_is_told_the_question(tmp_path: Path) -> None:
    from inspect_ai import score

    from trailmed.eval.inspect_task import partial

    prompt = benchmark_prompts("all", "home_safety")[0]
    log = evaluated(tmp_path, canned(lambda _: f"{prompt.text} How can I help you?"), [prompt])
    for scored in (log, score(log, partial(), action="overwrite", display="none")):
        assert scored.samples[0].scores["partial"].explanation == "partial: only restates the question"


def test_other_tasks_on_the_same_model_get_whole_answers(tmp_path: Path) -> None:
    from inspect_ai import Task
    from inspect_ai.dataset import Sample

    prompt = benchmark_prompts("held_out", "should_refuse")[0]
    model = canned(lambda _: HARMFUL)
    evaluated(tmp_path, model, [prompt])
    log = evaluated(tmp_path, model, [prompt], task=Task(dataset=[Sample(id=prompt.id, input=prompt.text)]))
    assert log.samples[0].output.completion == HARMFUL


def test_choice_of_prompts() -> None:
    from trailmed.eval.inspect_task import trailmed_triage

    task = trailmed_triage(split="validation", category=["gray_zone", "safe-control"], max_tokens=48)
    chosen = benchmark_prompts("validation", ["gray_zone", "safe_control"])
    assert [sample.id for sample in task.dataset] == [prompt.id for prompt in chosen]
    assert (task.config.temperature, task.config.max_tokens) == (0.0, 48)
    assert len(task.scorer) == 3  # no rubric for these
