"""Putting the prompts to a model on llama.cpp, under its own chat template, and judging what it answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gguf
import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field

from ..device.llama_runtime import DecodeSettings, DecodeStats, LlamaRuntime
from ..errors import TrailmedError
from ..files import sha256_of_file
from ..models.chat_template import ChatTemplate
from ..models.gguf_file import GgufFile
from ..progress import progress_bar
from .document import STORED
from .judge import judge
from .prompts import Name, Prompt, prompts_hash
from .runs import Answer, EvalRun

__all__ = ["KL", "Answer", "EvalRun", "evaluate", "first_token_kl"]

_KEY_EDIT_SHA256 = "trailmed.edit.sha256"  # written by export.bake, which evaluation does not import
_KEY_FILE_TYPE = "general.file_type"
_KEY_CHAT_TEMPLATE = "tokenizer.chat_template"

Nats = Annotated[float, Field(ge=0.0)]


@dataclass(frozen=True, slots=True)
class KL:
    """KL(base ‖ edited) of the first answer token, in nats: mean and largest over the prompts, and each prompt's by id."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    mean: Nats
    max: Nats
    per_prompt: Mapping[Name, Nats]


def evaluate(
    model: Path, prompts: Sequence[Prompt], *, name: str, settings: DecodeSettings, progress: bool = True,
    on_stats: Callable[[DecodeStats], None] | None = None,
) -> EvalRun:
    """Put every prompt to the GGUF `model` as a single user turn, decode greedily, and judge the answers.

    The run holds nothing that depends on speed; `on_stats` is called once with the decoding's throughput.
    Raises `TrailmedError` for no prompts, a prompt id that occurs twice, a missing or broken model, or one without chat template.
    """
    _check_prompts(prompts)
    metadata = _metadata(model)
    with LlamaRuntime(model, settings) as runtime:
        encoded = _encode(runtime, metadata, prompts)
        with progress_bar(f"answers {name}", len(prompts), enabled=progress) as advance:
            generations = runtime.generate(encoded, progress=advance)
        if on_stats is not None and runtime.last_stats is not None:
            on_stats(runtime.last_stats)
    answers = []
    for prompt, generation in zip(prompts, generations, strict=True):
        judgement = judge(generation.text, truncated=generation.stopped == "length")
        answers.append(Answer(
            id=prompt.id, category=prompt.category, scenario=prompt.scenario, expected=prompt.expected, text=prompt.text,
            verdict=judgement.verdict, reason=judgement.reason, answer=generation.text, tokens=len(generation.tokens),
            stopped=generation.stopped,
        ))
    return EvalRun(
        name=name, model=model.name, model_sha256=sha256_of_file(model), edit_sha256=_edit_sha256(metadata), type=_type(metadata),
        prompts_sha256=prompts_hash(prompts), settings=asdict(settings), answers=tuple(answers),
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
            metadata = _metadata(path)
            with LlamaRuntime(path, settings) as runtime:
                tokens.append(_encode(runtime, metadata, prompts))
                if tokens[0] != tokens[-1]:
                    raise TrailmedError(f"{edited}: has another tokenizer or chat template than {base}; compare an edit with its own base")
                rows.append(runtime.first_token_log_probs(tokens[-1], progress=advance))
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


def _metadata(model: Path) -> Mapping[str, Any]:
    with GgufFile.open(model) as file:
        wanted = (_KEY_EDIT_SHA256, _KEY_FILE_TYPE, _KEY_CHAT_TEMPLATE)
        return {key: file.metadata[key] for key in wanted if key in file.metadata}


def _encode(runtime: LlamaRuntime, metadata: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt as a single user turn under the model's own chat template, as token ids."""
    source = metadata.get(_KEY_CHAT_TEMPLATE)
    template = ChatTemplate(
        source if isinstance(source, str) else None,
        origin=str(runtime.path), bos_token=runtime.tokenizer.bos_token, eos_token=runtime.tokenizer.eos_token,
    )
    return [runtime.encode(template.prompt(prompt.text)) for prompt in prompts]


def _edit_sha256(metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get(_KEY_EDIT_SHA256)
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None


def _type(metadata: Mapping[str, Any]) -> str:
    """The file's type under llama.cpp's name (F16, Q8_0, Q4_K_M, …)."""
    try:
        name: str = gguf.LlamaFileType(metadata[_KEY_FILE_TYPE]).name
    except (KeyError, ValueError):
        return "unknown"
    return name.removeprefix("ALL_").removeprefix("MOSTLY_")
