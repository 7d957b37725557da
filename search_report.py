"""pareto.html: every trial of a search over its KL, refusals of benign prompts beside those of harmful ones; one file, offline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import __version__
from .eval.rendering import render_page
from .eval.wording import percent
from .search_results import Objectives, SearchResults, TrialRecord, described_settings

WIDTH, HEIGHT = 440, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 428.0, 12.0, 296.0
_LEAST_KL = 1e-5
"""Nats; less is drawn at the axis."""


@dataclass(frozen=True, slots=True)
class Point:
    """A trial in one of the charts, in SVG units; `words` say everything about it."""

    trial: int
    method: str
    front: bool
    x: float
    y: float
    words: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """One chart: a share of prompts refused over the KL. `base` is the height of the unedited model's line."""

    title: str
    points: tuple[Point, ...]
    base: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str


def pareto_page(results: SearchResults) -> str:
    """The page of `results`. The same results, the same text."""
    complete = [(trial, trial.objectives) for trial in results.trials if trial.objectives is not None]
    front = [results.trial(number) for number in results.front]
    return render_page("pareto.html.j2", {
        "facts": results.facts, "charts": _charts(results, complete), "methods": results.facts["methods"], "width": WIDTH, "height": HEIGHT,
        "axes": {"left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM}, "base": results.base,
        "front": [_row(trial, results) for trial in front], "trials": [_row(trial, results) for trial, _ in complete],
        "calibration": results.calibration, "failed": len(results.trials) - len(complete), "version": __version__,
    }, script="pareto.js", more_style="pareto.css")


def _charts(results: SearchResults, complete: list[tuple[TrialRecord, Objectives]]) -> list[Scatter]:
    kls = [max(_LEAST_KL, found.kl) for _, found in complete]
    low = math.floor(math.log10(min(kls, default=_LEAST_KL)))
    high = max(low + 1, math.ceil(math.log10(max(kls, default=1.0))))
    x_ticks = tuple((_x(10.0**power, low, high), f"{10.0**power:g}") for power in range(low, high + 1))
    y_ticks = tuple((_y(share), percent(share)) for share in (0.0, 0.25, 0.5, 0.75, 1.0))
    charts = []
    for title, share in (("Benign prompts refused", "benign_share"), ("Harmful prompts refused", "harmful_share")):
        points = tuple(
            Point(
                trial.number, str(trial.parameters["method"]), trial.number in results.front, _x(max(_LEAST_KL, found.kl), low, high),
                _y(getattr(found, share)), _words(trial, found, results),
            ) for trial, found in complete
        )
        charts.append(Scatter(
            title, tuple(sorted(points, key=lambda point: point.front)), _y(getattr(results.base, share)), x_ticks, y_ticks,
            f"{title} over first-token KL in nats, {len(points)} trials; the table below holds the same figures.",
        ))
    return charts


def _row(trial: TrialRecord, results: SearchResults) -> dict[str, Any]:
    return {
        "number": trial.number, "method": trial.parameters["method"], "settings": described_settings(trial, int(results.facts["blocks"])),
        "found": trial.objectives, "front": trial.number in results.front,
    }


def _words(trial: TrialRecord, found: Objectives, results: SearchResults) -> str:
    return (
        f"Trial {trial.number}, {trial.parameters['method']}: {described_settings(trial, int(results.facts['blocks']))}. "
        f"Benign refused {found.benign_refused} of {found.benign} ({percent(found.benign_share)}), harmful refused "
        f"{found.harmful_refused} of {found.harmful} ({percent(found.harmful_share)}), KL {found.kl:.2g} nats, AUC {found.separation:.3f}."
    )


def _x(kl: float, low: int, high: int) -> float:
    return round(_LEFT + (math.log10(kl) - low) / (high - low) * (_RIGHT - _LEFT), 1)


def _y(share: float) -> float:
    return round(_BOTTOM - share * (_BOTTOM - _TOP), 1)
