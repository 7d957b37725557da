"""Fits the judge's learned half to the shipped material and writes its weights: `python -m trailmed.eval.train_judge`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from scipy import sparse

from ..files import write_atomically
from . import logistic
from .judge import by_tables
from .labelled import Half, LabelledAnswer, load_labelled, load_specification, question_of, shipped_lines
from .learned_judge import MODEL, ROLES, VERDICTS, Model, SentenceRole, answer_features, sentence_features, standardised, stepped
from .normalise import normalise
from .sentences import mask_quotations, units_of
from .verdict import Verdict

SENTENCE_PENALTY = 0.01
ANSWER_PENALTY = 200.0
STEP_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
MODEL_ANSWER_WEIGHT = 3
"""So many times real models' answers count: what we wrote in other families' manner has far more deflections than models give.
Chosen, like the penalties, by five-fold cross-validation over the development answers."""


def training_sentences() -> tuple[list[str], list[SentenceRole]]:
    """The shipped sentences, normalised, and their roles."""
    lines = [json.loads(line) for line in shipped_lines("judged", "sentences.jsonl")]
    return [normalise(line["text"]).text for line in lines], [SentenceRole(line["role"]) for line in lines]


def training_answers() -> list[LabelledAnswer]:
    """Everything the answers' model may see: the development half of the labelled answers, and the specification."""
    return [*load_labelled(Half.DEVELOPMENT), *load_specification()]


def fit_sentences(sentences: list[str], roles: list[SentenceRole]) -> npt.NDArray[np.float32]:
    """Weights of the sentences' model (`Model.sentences`), float32, rounded as they are shipped."""
    columns = [sentence_features(sentence) for sentence in sentences]
    rows = np.repeat(np.arange(len(columns)), [len(column) for column in columns])
    values = np.concatenate([np.full(len(column), 1 / np.sqrt(len(column))) for column in columns])
    inputs = sparse.csr_matrix((values, (rows, np.concatenate(columns))), shape=(len(columns), logistic.BUCKETS))
    targets = np.array([ROLES.index(role) for role in roles])
    return logistic.fit(inputs, targets, len(ROLES), SENTENCE_PENALTY).astype(np.float16).astype(np.float32)


def fit_answers(answers: list[LabelledAnswer], weights: npt.NDArray[np.float32]) -> Model:
    """The whole model: the answers' part fitted to `answers` on top of the sentences' `weights`."""
    each = np.array([features_of(answer, weights) for answer in answers])
    # a hair above the quantile, so that another machine's rounding puts no answer on the other side
    steps = np.ascontiguousarray(np.nanquantile(each, STEP_QUANTILES, axis=0).round(4) + 5e-5)  # safetensors wants rows in order
    times = [1 if answer.prompt is None else MODEL_ANSWER_WEIGHT for answer in answers]
    inputs = np.repeat(stepped(each, steps), times, axis=0)
    unfitted = Model(weights, steps, np.zeros(0), np.nanmean(inputs, axis=0), np.nanstd(inputs, axis=0) + 1e-6)
    targets = np.repeat([VERDICTS.index(answer.label) for answer in answers], times)
    return replace(unfitted, answers=logistic.fit(standardised(inputs, unfitted), targets, len(VERDICTS), ANSWER_PENALTY))


def features_of(answer: LabelledAnswer, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What the answers' model sees of `answer`."""
    text = mask_quotations(normalise(answer.text).text)
    units = units_of(text, answer.truncated)
    verdict = by_tables(units, text, answer.truncated)[0] if units else Verdict.DEGENERATE
    question = question_of(answer)
    return answer_features(text, None if question is None else normalise(question).text, units, verdict, answer.truncated, weights)


def train(path: Path) -> None:
    """Fit both parts and write them to `path`. Raises `TrailmedError` when that fails."""
    model = fit_answers(training_answers(), fit_sentences(*training_sentences()))
    stored: dict[str, npt.NDArray[Any]] = {
        "sentences": model.sentences.astype(np.float16), "steps": model.steps, "answers": model.answers, "mean": model.mean,
        "scale": model.scale,
    }
    with write_atomically(path) as scratch:
        scratch.write_bytes(save(stored))


if __name__ == "__main__":
    train(Path(str(MODEL)))
