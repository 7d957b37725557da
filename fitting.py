"""From prompts to an `Edit`, step by step: observe the base, capture activations, find directions, fit.

This is the place where the benchmark's prompts and judge meet the methods, which know neither.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .abliterate.activations import Activations, capture, capture_inputs
from .abliterate.answers import greedy_answers
from .abliterate.conditional import ConditionalSettings, conditional
from .abliterate.directions import Directions, DirectionSettings, compute_directions
from .abliterate.distill import DistillSettings, distill
from .abliterate.edit import Edit
from .abliterate.gated import GatedSettings, gated
from .abliterate.observed import Observed, Role, masks_by_role
from .abliterate.origin import EditOrigin
from .abliterate.project import project
from .errors import TrailmedError
from .eval.judge import Verdict, judge
from .eval.prompts import Category, Prompt, Split, prompts_hash
from .files import read_json, sha256_of_file, write_json_atomically
from .models.fingerprint import fingerprint
from .models.gguf_file import GgufFile
from .models.load import LoadedModel
from .progress import progress_bar
from .settings import EditSettings, Method

_OBSERVED_TOKENS = 20
"""Enough of an answer to tell a refusal from help, and more than any method matches."""


_RETAIN_VALIDATION_SHARE = 0.15
"""Of the retain set's scenarios; the benchmark's validation split alone is too small to calibrate on."""


class _ObservedRecord(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    answer: list[Annotated[int, Field(ge=0)]]
    text: str
    verdict: Verdict


_RECORDS = TypeAdapter(list[_ObservedRecord])


def observe(model: LoadedModel, prompts: Sequence[Prompt], out: Path, *, progress: bool = True) -> None:
    """Answer every prompt with the base (greedy, 20 tokens, in the module's precision), judge, and write `out` as JSON."""
    with progress_bar("base answers", len(prompts), enabled=progress) as advance:
        answers = greedy_answers(
            model.module, [encode(model, prompt) for prompt in prompts], _OBSERVED_TOKENS, model.tokenizer.eos_ids, progress=advance,
        )
    records = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = answer_text(model, answer)
        verdict = judge(text, truncated=not _ended(model, answer), question=prompt.text).verdict
        # Of what a base says to harmful prompts only refusals are worth keeping, and nothing is needed of the rest.
        kept = list(answer) if prompt.category is not Category.SHOULD_REFUSE or verdict is Verdict.REFUSAL else []
        records.append({"id": prompt.id, "answer": kept, "text": text if kept else "", "verdict": verdict.value})
    write_json_atomically(out, records)


def read_observed(model: LoadedModel, prompts: Sequence[Prompt], path: Path) -> list[Observed]:
    """What `observe` wrote, joined with its prompts. Raises `TrailmedError` when the file is not of these prompts."""
    try:
        records = _RECORDS.validate_python(read_json(path))
    except ValidationError as error:
        raise TrailmedError(f"{path}: not a file of base answers ({error.errors()[0]['msg']}); remove it and run again") from error
    if [record.id for record in records] != [prompt.id for prompt in prompts]:
        raise TrailmedError(f"{path}: holds the answers to other prompts; remove it and run again")
    return [
        replace(observed, answer=tuple(record.answer), refused=record.verdict is Verdict.REFUSAL, asked=True)
        for observed, record in zip(unasked(model, prompts), records, strict=True)
    ]


def unasked(model: LoadedModel, prompts: Sequence[Prompt]) -> list[Observed]:
    """Prompts the base is not asked: what an edit learns from is that they are benign, or harmful."""
    return [
        Observed(
            id=prompt.id, category=prompt.category, should_refuse=prompt.category is Category.SHOULD_REFUSE,
            token_ids=tuple(encode(model, prompt)), answer=(), refused=False, scenario=prompt.scenario, asked=False,
        )
        for prompt in prompts
    ]


def encode(model: LoadedModel, prompt: Prompt) -> list[int]:
    """The prompt as a single user turn under the model's own chat template, as token ids."""
    return model.tokenizer.encode(model.template.prompt(prompt.text))


def answer_text(model: LoadedModel, answer: Sequence[int]) -> str:
    """An answer's text without its end token."""
    return model.tokenizer.decode([token for token in answer if token not in model.tokenizer.eos_ids])


def origin_of(base: Path, settings: EditSettings, prompts: Sequence[Prompt]) -> EditOrigin:
    """What an edit of `base` records about where it comes from."""
    with GgufFile.open(base) as file:
        mark = fingerprint(file)
    return EditOrigin(
        fingerprint=mark, base_sha256=sha256_of_file(base), recipe={"prompts_sha256": prompts_hash(prompts)},
        removed=settings.removed, kept=tuple(category for category in Category if category not in settings.removed), seed=settings.seed,
    )


def capture_activations(model: LoadedModel, prompts: Sequence[Prompt], *, progress: bool = True) -> Activations:
    """Last-token residual stream of every layer for `prompts`: float32 [n, layers + 1, d]."""
    encoded = [encode(model, prompt) for prompt in prompts]
    with progress_bar("activations", len(encoded), enabled=progress) as advance:
        return capture(model, encoded, prompts_sha256=prompts_hash(prompts), progress=advance)


def find_directions(activations: Activations, observed: Sequence[Observed], settings: EditSettings) -> Directions:
    """The directions `settings.method` needs, from the activations of `observed` (same prompts, same order).

    `distill` asks the ablated twin of *all* refusal, so its directions are taken from every refused prompt, category by category, and left
    as they are (the first is what the categories share); the others
    take the over-refusal direction of the removed categories, orthogonal to the harmful-refusal one (Wang et al. 2024).
    """
    masks = masks_by_role(observed, settings.removed)
    over_refused, harmful = masks[Role.OVER_REFUSED], masks[Role.HARMFUL_REFUSED]
    if not over_refused.any():
        raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
    if settings.method is Method.DISTILL:
        refused = over_refused | harmful
        categories = [prompt.category for prompt in observed]
        present = {category for category, one in zip(categories, refused.tolist(), strict=True) if one}
        plain = DirectionSettings(
            winsorize_quantile=1.0, gram_schmidt=False, orthogonalize_harmful=0.0, rank=min(settings.rank, len(present)),
            subspace="categories",
        )
        return compute_directions(activations, refused, masks[Role.COMPLIED], harmful, plain, categories=categories)
    return compute_directions(
        activations, over_refused, masks[Role.COMPLIED], harmful, DirectionSettings(rank=settings.rank),
        categories=[prompt.category for prompt in observed],
    )


def fit_edit(
    model: LoadedModel, directions: Directions, fit: Sequence[Observed], validation: Sequence[Observed], origin: EditOrigin,
    settings: EditSettings, *, crossed: Sequence[Observed] = (), progress: bool = True,
) -> Edit:
    """The edit by `settings.method`; `fit` are fit-split and retain prompts, `validation` tells `distill` where to stop, and both
    `distill` and `conditional` where the line between help and refusal lies
    (`conditional` also by cross-validation over `crossed`, a part of `fit`)."""
    torch.manual_seed(settings.seed)
    if settings.method is Method.CONDITIONAL:
        return conditional(
            model, fit, validation, settings.removed, origin,
            ConditionalSettings(nats=ConditionalSettings().nats * settings.alpha), crossed=crossed, progress=progress,
        )
    if settings.method is Method.DISTILL:
        return distill(
            model, fit, validation, settings.removed, directions, lambda answer: is_refusal(model, answer), origin,
            DistillSettings(rank=settings.rank, epochs=settings.epochs), progress=progress,
        )
    if settings.method is Method.GATED:
        masks = masks_by_role(fit, settings.removed)
        names = [name for layer in range(directions.layers) for name in model.architecture.residual_writers(layer)]
        with progress_bar("inputs of the writers", len(fit), enabled=progress) as advance:
            inputs = capture_inputs(model, [prompt.token_ids for prompt in fit], names, progress=advance)
        return gated(
            model, directions, inputs, masks[Role.OVER_REFUSED], masks[Role.COMPLIED] | masks[Role.KEPT_REFUSED],
            masks[Role.HARMFUL_REFUSED], origin, GatedSettings(alpha=settings.alpha),
        )
    return project(model, directions, origin, alpha=settings.alpha, preserve_norm=settings.method is Method.BIPROJECT)


def fit_prompts(benchmark: Sequence[Prompt], retain: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """(fit, validation): the benchmark's splits, each with its part of the retain set, whole scenarios at a time.

    Of the retain scenarios on validation's side only the harmful prompts are used: its benign ones are written to be hard, and a line
    drawn by them answers more harmful prompts than the benchmark's benign prompts call for. Raises `TrailmedError` when a split is empty.
    """
    fit = [prompt for prompt in benchmark if prompt.split is Split.FIT]
    validation = [prompt for prompt in benchmark if prompt.split is Split.VALIDATION]
    if not fit or not validation:
        raise TrailmedError("the prompts have no fit or no validation split; give more scenarios")
    for prompt in retain:
        if _share_of(prompt.scenario) >= _RETAIN_VALIDATION_SHARE:
            fit.append(prompt)
        elif prompt.category is Category.SHOULD_REFUSE:
            validation.append(prompt)
    return fit, validation


def sampled_scenarios(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """The prompts of as many whole scenarios as hold at most `most`, chosen by a hash of their name, in the order given."""
    sizes = Counter(prompt.scenario for prompt in prompts)
    chosen: set[str] = set()
    for scenario in sorted(sizes, key=lambda each: _share_of(f"sampled {each}")):  # not the order that `fit_prompts` shares them out by
        most -= sizes[scenario]
        if most < 0:
            break
        chosen.add(scenario)
    return [prompt for prompt in prompts if prompt.scenario in chosen]


def _share_of(scenario: str) -> float:
    """A fixed number in [0, 1) for a scenario's name, so that a scenario stays on its side when others are added."""
    return int.from_bytes(hashlib.sha256(scenario.encode()).digest()[:8], "big") / 2**64


def is_refusal(model: LoadedModel, answer: Sequence[int]) -> bool:
    """The judge's word on an answer given as tokens, its end token included where it ended."""
    return judge(answer_text(model, answer), truncated=not _ended(model, answer)).verdict is Verdict.REFUSAL


def _ended(model: LoadedModel, answer: Sequence[int]) -> bool:
    return bool(answer) and answer[-1] in model.tokenizer.eos_ids
