"""Putting the prompts to a model and judging what it answers; and how far an edit moves a model's first answer token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from ..device.engine import Engine, Reply
from ..device.llama_engine import LlamaEngine
from ..device.llama_runtime import DecodeSettings
from ..errors import TrailmedError
from ..progress import progress_bar
from .document import STORED
from .live import live_verdicts
from .prompts import Name, Prompt, prompts_hash
from .run_folder import RunFolder
from .runs import Answer, EvalRun, RunHeader, judge_answer

__all__ = ["KL", "Answer", "EvalRun", "evaluate", "first_token_kl"]

Nats = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True, slots=True)
class KL:
    """KL(base ‖ edited) of the first answer token, in nats: mean and largest over the prompts, and each prompt's by id."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    mean: Nats
    max: Nats
    per_prompt: Mapping[Name, Nats]


def evaluate(
    engine: Engine, prompts: Sequence[Prompt], *, name: str, folder: Path | None = None, progress: bool = True,
) -> EvalRun:
    """Put every prompt to `engine` as a single user turn and judge the answers.

    With `folder` every answer is kept there as soon as it is finished (`RunFolder`), and those it holds already are not asked for
    again. The run holds nothing that depends on speed.
    Raises `TrailmedError` for no prompts, a prompt id that occurs twice, a folder of another run, and as the engine does.
    """
    _check_prompts(prompts)
    identity = engine.identity
    header = RunHeader(
        name=name, model=identity.model, model_sha256=identity.sha256, edit_sha256=identity.edit_sha256, type=identity.type,
        prompts_sha256=prompts_hash(prompts), settings=identity.settings, engine=identity.engine,
    )
    with RunFolder(folder, header, prompts) if folder else nullcontext() as kept, \
            live_verdicts(f"answers {name}", len(prompts), enabled=progress) as note:
        answers = dict(kept.answers) if kept else {}
        for answer in answers.values():
            note(answer)
        asked = [prompt for prompt in prompts if prompt.id not in answers]

        def finished(index: int, reply: Reply) -> None:
            answer = _judged(asked[index], reply)
            if kept:
                kept.add(answer)
            answers[answer.id] = answer
            note(answer)

        if asked:
            engine.answer([prompt.text for prompt in asked], finished)
        in_order = [answers[prompt.id] for prompt in prompts]
        if kept:
            kept.finish(in_order)
    return EvalRun.of(header, in_order)


def _judged(prompt: Prompt, reply: Reply) -> Answer:
    judged = judge_answer(prompt.category, prompt.text, reply.text, reply.stopped)
    return Answer(
        id=prompt.id, category=prompt.category, scenario=prompt.scenario, expected=prompt.expected, text=prompt.text,
        verdict=judged.verdict, reason=judged.reason, answer=judged.answer, tokens=reply.tokens, stopped=reply.stopped,
    )


def first_token_kl(base: Path, edited: Path, prompts: Sequence[Prompt], settings: DecodeSettings, *, progress: bool = True) -> KL:
    """How far the edit moves the distribution of the answer's first token, KL(base ‖ edited) in nats, on each of `prompts`.

    The capability measure of Arditi et al. 2024 (arXiv:2406.11717). Computed in float64 over the whole vocabulary; holds two float32
    rows of the vocabulary's size per prompt, and one model in memory at a time.
    Raises `TrailmedError` when there are no prompts, the two files do not make the same tokens of a prompt, or a model's
    probabilities are not numbers.
    """
    _check_prompts(prompts)
    tokens: list[list[list[int]]] = []
    rows: list[npt.NDArray[np.float32]] = []
    with progress_bar("first-token KL", 2 * len(prompts), enabled=progress) as advance:
        for path in (base, edited):
            with LlamaEngine(path, settings) as engine:
                tokens.append(engine.encode([prompt.text for prompt in prompts]))
                if tokens[0] != tokens[-1]:
                    raise TrailmedError(f"{edited}: has another tokenizer or chat template than {base}; compare an edit with its own base")
                rows.append(engine.runtime.first_token_log_probs(tokens[-1], progress=advance))
    if rows[0].shape != rows[1].shape:
        raise TrailmedError(f"{edited}: has another vocabulary than {base}; compare an edit with its own base")
    values = kl_divergence(rows[0], rows[1])
    if not np.isfinite(values).all():
        raise TrailmedError(f"{edited}: its probabilities, or those of {base}, are not all numbers; make the file anew")
    return KL(
        mean=float(values.mean()), max=float(values.max()),
        per_prompt={prompt.id: float(value) for prompt, value in zip(prompts, values, strict=True)},
    )


def kl_divergence(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """KL(first ‖ second) of each row of two [n, vocab] tables of log-probabilities, in nats, float64 [n]."""
    result = np.empty(len(first), dtype=np.float64)
    for row, (log_p, log_q) in enumerate(zip(first.astype(np.float64), second.astype(np.float64), strict=True)):
        # float32 rows sum to 1 only to about 1e-5; left so, KL could come out negative
        log_p, log_q = log_p - np.logaddexp.reduce(log_p), log_q - np.logaddexp.reduce(log_q)
        p = np.exp(log_p)
        result[row] = np.sum(p[p > 0] * (log_p[p > 0] - log_q[p > 0]))
    return np.maximum(result, 0.0)


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise TrailmedError("no prompts to put to the model; choose categories and a split that have some")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise TrailmedError(f"prompt id {prompt.id!r} occurs twice; ids must be unique")
        seen.add(prompt.id)
