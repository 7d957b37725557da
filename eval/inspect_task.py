"""The benchmark as an Inspect AI task (https://inspect.aisi.org.uk): `inspect eval trailmed/trailmed_triage --model PROVIDER/MODEL`.

Any model that Inspect reaches is asked each prompt as a single user turn at temperature 0; the deterministic judge and the triage rubric
score the answers. `-T split=held_out` and `-T category=emergency_medical,mental_health` ask fewer. For a local folder in Hugging Face
format: `--model hf/NAME -M model_path=FOLDER -M do_sample=false -M 'tokenizer_call_args={"add_special_tokens": false}'`, because that
provider hands temperature 0 to sampling, which transformers refuses, and tokenizes the chat template's text, special tokens and all.
`HF_HUB_OFFLINE=1` spares the minute that Inspect spends on NAME in the hub. A GGUF is reached through llama.cpp's server (`openai-api/…`).

An Inspect log holds all that a model said, but no more than the first characters of a harmful answer may be kept. So answers are judged,
and harmful ones cut, inside the model's provider, before Inspect sees them (`withhold_harmful`): neither log, events, raw API calls,
cache, live view nor terminal holds more. As the task's `setup` this stays in force under another solver.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, GenerateConfig, ModelAPI, ModelCall, ModelOutput, get_model
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, grouped, mean, metric, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

from ..device.engine import Stopped
from ..errors import TrailmedError
from .harness import benchmark_prompts, fills_limit, triage_value
from .judge import Verdict
from .prompts import BENIGN_CATEGORIES, Category, Prompt, prompts_hash
from .rubric import load_rubric
from .runs import JudgedAnswer, judge_answer

_KEY = "trailmed"
"""Of the model output's metadata: what the guard saw of an answer before it was cut."""

_asked: ContextVar[tuple[Category, str] | None] = ContextVar("trailmed_asked", default=None)
"""Category and text of the prompt that the running sample asks."""


@task
def trailmed_triage(split: str = "all", category: str | list[str] | None = None, max_tokens: int = 96) -> Task:
    """trailmed's benchmark: over-refusal on emergency and safety questions, refusals that must be kept, and triage of the answers.

    `split`: all, held_out, validation or fit; `category`: one of the eight or several; `max_tokens`: of an answer.
    """
    prompts = benchmark_prompts(split, category)
    with_rubric = any((prompt.category, prompt.scenario) in load_rubric() for prompt in prompts)
    return Task(
        dataset=MemoryDataset([_sample(prompt) for prompt in prompts], name="trailmed"),
        setup=withhold_harmful(),
        solver=generate(),
        scorer=[refusal(), partial(), degenerate(), *([triage()] if with_rubric else [])],
        config=GenerateConfig(temperature=0.0, max_tokens=max_tokens),
        metadata={"prompts_sha256": prompts_hash(prompts)},
    )


@solver
def withhold_harmful() -> Solver:
    """From here on, what the sample's model answers is judged and, where it answers a harmful request, cut before anything records it."""

    async def solve(state: TaskState, _generate: Generate) -> TaskState:
        _guard(get_model().api)
        _asked.set((Category(state.metadata["category"]), state.input_text))
        return state

    return solve


@metric
def over_benign() -> Metric:
    """The mean over the samples of the six benign categories, as `benign`; nothing where none was asked."""

    def measure(scores: list[SampleScore]) -> dict[str, float]:
        values = [each.score.as_float() for each in scores if (each.sample_metadata or {}).get("category") in BENIGN_CATEGORIES]
        return {"benign": sum(values) / len(values)} if values else {}

    return measure


def _by_category(measure: Metric, name: str = "{group_name}") -> Metric:
    return grouped(measure, "category", all=False, name_template=name)


_SHARES = [over_benign(), _by_category(mean()), _by_category(stderr(cluster="scenario"), "{group_name}_stderr")]


@scorer(metrics=_SHARES)
def refusal() -> Scorer:
    """1 for an answer that refuses; the judge's verdict and its reason. Its means are the refusal rates."""
    return _is(Verdict.REFUSAL)


@scorer(metrics=_SHARES)
def partial() -> Scorer:
    """1 for an answer that deflects without helping."""
    return _is(Verdict.PARTIAL)


@scorer(metrics=_SHARES)
def degenerate() -> Scorer:
    """1 for an answer that is broken: empty, looping, garbled."""
    return _is(Verdict.DEGENERATE)


@scorer(metrics=[mean(), stderr(cluster="scenario"), _by_category(mean())])
def triage() -> Scorer:
    """How well an answer triages, 0 to 100, by the rubric; prompts without one are left out."""

    async def score(state: TaskState, _target: Target) -> Score | None:
        category, judged = Category(state.metadata["category"]), _judged(state)
        value = triage_value(category, state.metadata["scenario"], str(state.sample_id), judged.answer, judged.verdict)
        return None if value is None else Score(value=value)

    return score


def _is(verdict: Verdict) -> Scorer:
    async def score(state: TaskState, _target: Target) -> Score:
        judged = _judged(state)
        return Score(value=int(judged.verdict is verdict), answer=judged.answer, explanation=f"{judged.verdict}: {judged.reason}")

    return score


def _sample(prompt: Prompt) -> Sample:
    metadata = {"category": prompt.category.value, "scenario": prompt.scenario, "voice": prompt.voice, "split": str(prompt.split)}
    return Sample(id=prompt.id, input=prompt.text, target=prompt.expected.value, metadata=metadata)


def _judged(state: TaskState) -> JudgedAnswer:
    """The sample's answer as judged: by the guard if the request was harmful, else anew, so that an old log can be scored again."""
    category, answer = Category(state.metadata["category"]), state.output.completion
    seen = (state.output.metadata or {}).get(_KEY)
    if category is not Category.SHOULD_REFUSE:
        return judge_answer(category, state.input_text, answer, "eos" if seen is None else seen["stopped"])
    if seen is not None:
        return JudgedAnswer(Verdict(seen["verdict"]), seen["reason"], answer)
    if answer:
        raise TrailmedError(
            f"{state.sample_id}: the answer did not pass the task's guard, which keeps harmful answers out of logs; it comes from a model "
            "other than the one evaluated, or from a cache that another task filled"
        )
    return judge_answer(category, state.input_text, answer, "eos")


def _guard(api: ModelAPI) -> None:
    """Judge, and cut where it must be, what `api` answers when a sample of this task asks; other tasks get their answers as they are."""
    if getattr(api, "trailmed_guard", False):
        return
    answering = api.generate

    async def guarded(input: list[Any], tools: list[Any], tool_choice: Any, config: GenerateConfig) -> Any:
        result = await answering(input=input, tools=tools, tool_choice=tool_choice, config=config)
        output, call = result if isinstance(result, tuple) else (result, None)
        asked = _asked.get()
        if asked is None or not isinstance(output, ModelOutput):
            return result
        category, question = asked
        stopped = _stopped(output, api, config)
        judged = judge_answer(category, question, output.completion, stopped)
        seen = {"verdict": judged.verdict.value, "reason": judged.reason, "stopped": stopped}
        if category is not Category.SHOULD_REFUSE:
            output.metadata = {**(output.metadata or {}), _KEY: seen}
            return result
        # made anew: thoughts, further choices, log-probabilities and hidden states tell the answer, too
        message = ChatMessageAssistant(content=judged.answer, model=output.model, source="generate")
        choice = ChatCompletionChoice(message=message, stop_reason="unknown" if output.empty else output.stop_reason)
        kept = ModelOutput(model=output.model, choices=[choice], usage=output.usage, time=output.time, metadata={_KEY: seen})
        # always with a call: a provider may have filed one of its own, which this one replaces
        return kept, ModelCall(request=call.request if call else {}, response={"withheld": "by trailmed"}, time=call.time if call else None)

    api.generate, api.trailmed_guard = guarded, True


def _stopped(output: ModelOutput, api: ModelAPI, config: GenerateConfig) -> Stopped:
    """What ended the answer. The `hf` provider does not say, and counts a batch's longest answer for each."""
    reason = "unknown" if output.empty else output.stop_reason
    if reason == "content_filter":
        return "blocked"
    if reason != "unknown" or output.usage is None or config.max_tokens is None:
        return "length" if reason in ("max_tokens", "model_length") else "eos"
    tokens, tokenizer = output.usage.output_tokens, getattr(api, "tokenizer", None)
    if tokenizer is not None:
        tokens = min(tokens, len(tokenizer(output.completion, add_special_tokens=False)["input_ids"]))
    return "length" if fills_limit(tokens, config.max_tokens) else "eos"
