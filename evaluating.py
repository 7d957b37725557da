"""`eval`: any model, on any engine, put to the benchmark or to prompts of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .device.engine import Engine
from .errors import TrailmedError
from .eval.benchmark import evaluate
from .eval.external import load_any_prompts
from .eval.prompts import Category, Prompt, Split, choose, load_benchmark, load_challenge, load_phrasings, sample
from .eval.runs import EvalRun
from .models.source import resolve_model
from .settings import EngineName, EvalSettings


def eval(
    model: str, out: Path | None = None, settings: EvalSettings = EvalSettings(), *, split: Split | None = None,
    categories: Sequence[Category] = (), limit: int | None = None, phrasings: bool = False, challenge: bool = False,
    prompts: Path | None = None, columns: Sequence[str] = (), progress: bool = True,
) -> EvalRun:
    """Put prompts to `model` and judge its answers.

    The prompts are the shipped benchmark's (with `phrasings`, its further phrasings too), the `challenge` set's, or those of the file
    `prompts`, whose table columns `columns` name ("text=question"); of one `split`, of some `categories`, at most `limit` (see
    `sample`). With `out`, a folder, an interrupted evaluation goes on there. Raises `TrailmedError` for bad input and as the engine does.
    """
    if limit is not None and limit < 1:
        raise TrailmedError(f"limit is {limit}; it must be at least 1")
    if (prompts is not None) + phrasings + challenge > 1:
        raise TrailmedError("--phrasings belongs to the benchmark, and --challenge and --prompts take its place; give one of the three")
    if prompts is None and columns:
        raise TrailmedError("columns are those of a file of prompts; give --prompts as well, or leave --column out")
    found = _prompts(phrasings, challenge) if prompts is None else load_any_prompts(prompts, columns)
    chosen = choose(found, split=split, categories=categories)
    if limit is not None:
        chosen = sample(chosen, limit)
    with open_engine(model, settings, progress=progress) as engine:
        return evaluate(engine, chosen, name=_name(model, settings), folder=out, progress=progress)


def open_engine(model: str, settings: EvalSettings, *, progress: bool = True) -> Engine:
    """The engine that `settings` ask for, with `model` in it. Raises `TrailmedError` when it cannot be had or cannot run the model."""
    name = settings.engine or (EngineName.LLAMA_CPP if settings.endpoint is None else EngineName.ENDPOINT)
    if (name is EngineName.ENDPOINT) != (settings.endpoint is not None):
        raise TrailmedError(f"engine {name} {'needs' if settings.endpoint is None else 'does not go with'} --endpoint URL")
    # each engine brings its own heavy library
    if settings.endpoint is not None:
        from .device.endpoint_engine import EndpointEngine, EndpointSettings

        return EndpointEngine(settings.endpoint, model or None, EndpointSettings(
            max_tokens=settings.max_tokens, concurrency=settings.concurrency, timeout_s=settings.timeout, retries=settings.retries,
        ))
    if name is EngineName.TRANSFORMERS:
        from .device.transformers_engine import TransformersEngine, TransformersSettings

        path = Path(model).expanduser()
        return TransformersEngine(path if path.is_dir() else resolve_model(model, progress=progress), TransformersSettings(
            max_tokens=settings.max_tokens, slots=settings.slots, threads=settings.threads,
        ))
    if name is EngineName.ONNX:
        from .device.onnx_engine import OnnxEngine, OnnxSettings

        return OnnxEngine(Path(model).expanduser(), OnnxSettings(
            max_tokens=settings.max_tokens, slots=settings.slots, threads=settings.threads,
        ))
    from .device.llama_engine import LlamaEngine
    from .device.llama_runtime import DecodeSettings

    return LlamaEngine(resolve_model(model, progress=progress), DecodeSettings(
        max_tokens=settings.max_tokens, slots=settings.slots, threads=settings.threads, exact=settings.exact,
    ))


def _prompts(phrasings: bool, challenge: bool) -> list[Prompt]:
    return load_challenge() if challenge else [*load_benchmark(), *(load_phrasings() if phrasings else ())]


def _name(model: str, settings: EvalSettings) -> str:
    return (model or "endpoint") if settings.endpoint is not None else Path(model).name.removesuffix(".gguf")
