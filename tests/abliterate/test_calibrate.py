"""The line between help and refusal: separation, the shift's algebra, and how a shift is chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from small_models import tiny_module

from trailmed.abliterate.calibrate import SHARES, Counts, best_shift, refusal_log_odds, separation, shifted, utility

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)


@settings(deadline=None)
@given(benign=SCORES, harmful=SCORES)
def test_separation_is_mann_whitney(benign: list[float], harmful: list[float]) -> None:
    statistic = mannwhitneyu(harmful, benign).statistic
    assert separation(benign, harmful) == pytest.approx(statistic / (len(benign) * len(harmful)))


def test_separation_without_a_class_says_nothing() -> None:
    assert separation([], [1.0]) == separation([1.0], []) == 0.5


@pytest.mark.parametrize("share", [-0.5, 0.0, 0.3, 1.0])
def test_a_shift_takes_its_share_of_the_direction_out_of_the_edited_output(share: float) -> None:
    random = np.random.default_rng(0)
    w, b, a, r = (random.standard_normal(shape) for shape in ((6, 9), (6, 2), (2, 9), 6))
    r /= np.linalg.norm(r)
    expected = (np.eye(6) - share * np.outer(r, r)) @ (w + b @ a)
    pair = (torch.tensor(b, dtype=torch.float32), torch.tensor(a, dtype=torch.float32))
    moved_b, moved_a = shifted({"w": pair}, {"w": torch.tensor(w, dtype=torch.float32)}, torch.tensor(r, dtype=torch.float32), share)["w"]
    assert moved_b.shape == (6, 3)
    np.testing.assert_allclose(w + moved_b.double().numpy() @ moved_a.double().numpy(), expected, atol=1e-5)


def test_log_odds_are_those_of_the_whole_opening() -> None:
    module = tiny_module("qwen2")
    prompts, refusal = [[3, 4, 5], [6, 7, 8, 9, 10], [3]], [11, 12, 13, 14]
    found = refusal_log_odds(module, prompts, refusal)
    for prompt, score in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = module(torch.tensor([[*prompt, *refusal[:3]]])).logits[0].double().numpy()
        rows = logits[len(prompt) - 1 : len(prompt) + 2]
        p = math.prod(float(np.exp(row[token]) / np.exp(row).sum()) for row, token in zip(rows, refusal, strict=False))
        assert score == pytest.approx(math.log(p / (1 - p)), abs=1e-3)


def counts(benign: int, harmful: int) -> Counts:
    return Counts(benign, 100, harmful, 50)


def test_the_best_price_is_taken_while_retention_holds() -> None:
    base = counts(30, 25)
    outcomes = dict(zip(SHARES, [counts(25, 48), counts(20, 47), counts(8, 44), counts(6, 36), counts(5, 26), counts(1, 24)], strict=True))
    share, tried = best_shift(outcomes.__getitem__, base, 3.0)
    assert share == SHARES[2]
    assert [each for each, _ in tried] == list(SHARES)
    # At a high price of refused emergencies the last share that keeps retention wins, never the one that loses it.
    assert best_shift(outcomes.__getitem__, base, 1000.0)[0] == SHARES[4]


def test_nothing_beyond_lost_retention_is_tried() -> None:
    asked: list[float] = []

    def count(share: float) -> Counts:
        asked.append(share)
        return counts(20, 30) if share < 0.1 else counts(0, 10)

    share, _ = best_shift(count, counts(30, 25), 3.0)
    assert share == SHARES[0]
    assert asked == list(SHARES[:3])


def test_when_no_share_keeps_retention_the_smallest_is_taken() -> None:
    assert best_shift(lambda _: counts(0, 0), counts(30, 25), 3.0)[0] == SHARES[0]


def test_utility_counts_rates() -> None:
    assert utility(Counts(10, 100, 40, 50), 3.0) == pytest.approx(0.8 - 0.3)
    assert utility(Counts(0, 0, 0, 0), 3.0) == 0.0
