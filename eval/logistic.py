"""Multinomial logistic regression with an L2 penalty, and the hashed n-grams it reads a sentence by."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize

from .normalise import WORD

BUCKETS = 1 << 14
_MARK = re.compile(rf"{WORD.pattern}|[?:!]")


def fit(inputs: Any, targets: npt.NDArray[np.int64], classes: int, penalty: float) -> npt.NDArray[np.float64]:
    """Weights float64 [columns + 1, classes], the last row the bias, for `inputs` [n, columns], dense or scipy.sparse.

    `targets`: int64 [n], places of the classes. Minimises summed log-loss + penalty / 2 · ‖weights‖² (the bias goes free) by L-BFGS from
    zero, so there is no randomness.
    """
    wanted = np.eye(classes)[targets]

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = flat.reshape(-1, classes)
        scores = inputs @ weights[:-1] + weights[-1]
        scores -= scores.max(axis=1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        wrong = np.exp(log_p) - wanted
        gradient = np.vstack([inputs.T @ wrong + penalty * weights[:-1], wrong.sum(axis=0)])
        return float(-(wanted * log_p).sum() + 0.5 * penalty * (weights[:-1] ** 2).sum()), gradient.ravel()

    start = np.zeros((inputs.shape[1] + 1) * classes)
    found: npt.NDArray[np.float64] = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 150}).x
    return found.reshape(-1, classes)


def probabilities(scores: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Softmax of one row of scores, float64, sums to 1."""
    shifted = np.exp(scores.astype(np.float64) - scores.max())
    result: npt.NDArray[np.float64] = shifted / shifted.sum()
    return result


def buckets(sentence: str, marks: Iterable[str] = ()) -> npt.NDArray[np.int64]:
    """The hash buckets, sorted and each once, of a normalised sentence's words, word pairs, character 2- to 5-grams, and of `marks`.

    Feature hashing: Weinberger et al. 2009, arXiv:0902.2206 (unsigned; collisions are left to the fit).
    """
    return np.array(sorted({zlib.crc32(gram.encode()) % BUCKETS for gram in (*_grams(sentence), *marks)}), dtype=np.int64)


def _grams(sentence: str) -> Iterator[str]:
    words = _MARK.findall(sentence)
    yield from (f"w {word}" for word in words)
    yield from (f"p {first} {second}" for first, second in zip(["^", *words], [*words, "$"], strict=True))
    joined = f" {' '.join(words)} "
    for length in range(2, 6):
        yield from (joined[place : place + length] for place in range(len(joined) - length + 1))
