"""The line between help and refusal: separation, the margins, and how far the line is moved."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from small_models import tiny_module

from trailmed.abliterate.calibrate import MOST_COUNTS, Counts, least_move, margins, refusal_log_odds, separation

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@settings(deadline=None)
@given(benign=SCORES, harmful=SCORES)
def test_separation_is_mann_whitney(benign: list[float], harmful: list[float]) -> None:
    statistic = mannwhitneyu(harmful, benign).statistic
    assert separation(benign, harmful) == pytest.approx(statistic / (len(benign) * len(harmful)))


def test_separation_without_a_class_says_nothing() -> None:
    assert separation([], [1.0]) == separation([1.0], []) == 0.5


@pytest.mark.parametrize("openings", [[[11, 12, 13]], [[11, 12, 13], [11, 14], [5]]])
def test_log_odds_are_those_of_any_of_the_whole_openings(openings: list[list[int]]) -> None:
    module = tiny_module("qwen2")
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [3]]
    found = refusal_log_odds(module, prompts, openings)
    for prompt, score in zip(prompts, found, strict=True):
        p = 0.0
        for opening in openings:
            with torch.inference_mode():
                logits = module(torch.tensor([[*prompt, *opening]])).logits[0].double().numpy()
            rows = logits[len(prompt) - 1 : -1]
            p += math.prod(float(np.exp(row[token]) / np.exp(row).sum()) for row, token in zip(rows, opening, strict=True))
        assert score == pytest.approx(math.log(p / (1 - p)), abs=1e-3)


def test_log_odds_of_no_opening_are_refused() -> None:
    with pytest.raises(ValueError, match="no opening"):
        refusal_log_odds(tiny_module("qwen2"), [[3, 4]], [])


BASE = Counts(30, 100, 25, 50)


def logistic(nats: float, middle: float, total: int) -> int:
    return round(total / (1 + math.exp(middle - nats)))


def model(benign_line: float, harmful_line: float) -> Callable[[float], Counts]:
    """Counts of a model that refuses half of either kind when the line is moved by these nats."""
    return lambda nats: Counts(logistic(nats, benign_line, 100), 100, logistic(nats, harmful_line, 50), 50)


def test_margins_are_standard_errors_inside_the_limits() -> None:
    # Benign: 6 % allowed (a fifth of 30 %), 2 % found; harmful: 50 % wanted, 70 % found. One pseudo-count of each kind.
    benign, harmful = margins(Counts(2, 100, 35, 50), BASE, 0.8)
    p, q = 7 / 102, 26 / 52
    assert benign == pytest.approx(0.04 / math.sqrt(p * (1 - p) / 102))
    assert harmful == pytest.approx(0.2 / math.sqrt(q * (1 - q) / 52))
    outside = margins(Counts(7, 100, 24, 50), BASE, 0.8)
    assert outside[0] < 0
    assert outside[1] < 0


@pytest.mark.parametrize("base", [Counts(0, 0, 0, 0), Counts(0, 10, 0, 10), Counts(10, 10, 10, 10)])
def test_margins_without_refusals_or_prompts_are_numbers(base: Counts) -> None:
    assert all(map(math.isfinite, margins(base, base, 0.8)))


@settings(deadline=None)
@given(benign_line=st.floats(-4, 6), gap=st.floats(0, 6))
def test_the_line_is_moved_no_further_than_the_limits_ask(benign_line: float, gap: float) -> None:
    count = model(benign_line, benign_line - gap)
    nats, tried = least_move(count, BASE, 0.8)
    assert len(tried) <= MOST_COUNTS
    assert nats in [each for each, _ in tried]

    def worst(at: float) -> float:
        return min(margins(count(at), BASE, 0.8))

    clear = [step / 50 for step in range(-200, 201) if worst(step / 50) >= 0.5]
    if worst(nats) >= 0.5:
        assert abs(nats) <= min(map(abs, clear)) + 0.25 + 0.02  # the last step of the bisection, and of the grid
    else:
        assert max(clear, default=0.0) - min(clear, default=0.0) <= 0.25  # nothing is clear, or less than the bisection sees
        assert worst(nats) == max(min(margins(found, BASE, 0.8)) for _, found in tried)


def test_an_over_refusing_edit_is_moved_towards_help_and_the_reverse() -> None:
    refusing, helping = model(-1.0, -4.0), model(5.0, 3.0)
    assert least_move(refusing, BASE, 0.8)[0] < 0 < least_move(helping, BASE, 0.8)[0]


def test_a_line_that_is_clear_stays_after_one_count() -> None:
    nats, tried = least_move(lambda _: Counts(0, 100, 50, 50), BASE, 0.8)
    assert (nats, len(tried)) == (0, 1)


def test_a_line_that_does_not_move_is_left_where_it_is_after_few_counts() -> None:
    nats, tried = least_move(lambda _: Counts(50, 100, 50, 50), BASE, 0.8)
    assert nats == 0
    assert [each for each, _ in tried] == [0, -1, -2, -3, -4]
