"""The report's bars: where each part of one category's chart lies, in SVG units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .compare import Rate
from .results import Results
from .wording import goal, interval, percent, title

WIDTH = 340
_ROW = 22
_BAR_HEIGHT = 13
_PAIR_GAP = 7
_AXIS_LEFT, _AXIS_RIGHT = 92.0, 292.0
_AXIS_ROOM = 18


@dataclass(frozen=True, slots=True)
class Bar:
    """A refusal rate from the axis to `end`, with whiskers from `low` to `high` at height `middle`."""

    label: str
    model: Literal["base", "edited"]
    quantized: bool
    top: float
    middle: float
    end: float
    low: float
    high: float
    count: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Refusals in one group of prompts; `description` says all of it in words, for those who do not see it."""

    group: str
    title: str
    goal: str
    n: int
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    bottom: float
    height: float
    description: str
    width: int = WIDTH
    left: float = _AXIS_LEFT
    bar_height: float = _BAR_HEIGHT


def charts(results: Results) -> list[Chart]:
    """One chart per category that was measured, and one for all benign prompts."""
    found = []
    for group in results.comparisons.edit_full.groups[:-1]:
        quantized = results.comparisons.edit_quantized.group(group.name)
        if quantized is not None:
            full, small = results.runs.edited_full.type, results.runs.edited_quantized.type
            found.append(_chart(group.name, (
                (f"Base {full}", "base", False, group.first), (f"Base {small}", "base", True, quantized.first),
                (f"Edited {full}", "edited", False, group.second), (f"Edited {small}", "edited", True, quantized.second),
            )))
    return found


def _chart(group: str, rows: tuple[tuple[str, Literal["base", "edited"], bool, Rate], ...]) -> Chart:
    bars = []
    for index, (label, model, quantized, rate) in enumerate(rows):
        top = 2 + index * _ROW + (_PAIR_GAP if model == "edited" else 0)
        bars.append(Bar(
            label=label, model=model, quantized=quantized, top=top, middle=top + _BAR_HEIGHT / 2, end=_x(rate.share),
            low=_x(rate.low), high=_x(rate.high), count=f"{rate.count}/{rate.n}",
        ))
    bottom = len(rows) * _ROW + _PAIR_GAP
    said = "; ".join(f"{label} {rate.count} of {rate.n}, {percent(rate.share)}, interval {interval(rate)}" for label, _, _, rate in rows)
    return Chart(
        group=group, title=title(group), goal=goal(group), n=rows[0][3].n, bars=tuple(bars),
        ticks=tuple((_x(share), percent(share)) for share in (0.0, 0.5, 1.0)), bottom=bottom, height=bottom + _AXIS_ROOM,
        description=f"Refused, {title(group)}: {said}.",
    )


def _x(share: float) -> float:
    return round(_AXIS_LEFT + share * (_AXIS_RIGHT - _AXIS_LEFT), 1)
