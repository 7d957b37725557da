"""Does it matter how a thing is said? Whether the phrasings of one scenario get the same verdict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .compare import ALL, Rate, rate_of
from .prompts import Category
from .runs import Answer, EvalRun


@dataclass(frozen=True, slots=True)
class Scenario:
    """The answers to the phrasings of one scenario in one category (a harmful twin is another question), two or more."""

    category: Category
    name: str
    answers: tuple[Answer, ...]

    @property
    def depends(self) -> bool:
        """Whether some phrasings are refused and others are not."""
        return len({answer.refused for answer in self.answers}) > 1


@dataclass(frozen=True, slots=True)
class PhrasingGroup:
    """`mixed`: how many scenarios of a category (or `ALL`) are refused in one phrasing and not in another, of those asked in several."""

    name: str
    mixed: Rate


@dataclass(frozen=True, slots=True)
class PhrasingSensitivity:
    """What `phrasing_sensitivity` found in the run of that name; no groups when every scenario was asked once."""

    run: str
    groups: tuple[PhrasingGroup, ...]
    scenarios: tuple[Scenario, ...]

    def group(self, name: str) -> PhrasingGroup | None:
        """The group of that name, None when no scenario of it was asked in several phrasings."""
        return next((group for group in self.groups if group.name == name), None)


def phrasing_sensitivity(run: EvalRun) -> PhrasingSensitivity:
    """How often the refusal of a scenario hangs on its wording; scenarios are the unit, with Wilson intervals of their share.

    Refused in every phrasing and refused in none are both consistent. The share grows with the number of phrasings by itself, so compare
    it between runs over the same prompts only.
    """
    by_scenario: dict[tuple[Category, str], list[Answer]] = defaultdict(list)
    for answer in run.answers:
        by_scenario[answer.category, answer.scenario].append(answer)
    scenarios = tuple(
        Scenario(category, name, tuple(answers)) for (category, name), answers in by_scenario.items() if len(answers) > 1
    )
    by_category = [(str(category), [each for each in scenarios if each.category is category]) for category in Category]
    groups = tuple(PhrasingGroup(name, _mixed(members)) for name, members in [*by_category, (ALL, list(scenarios))] if members)
    return PhrasingSensitivity(run.name, groups, scenarios)


def _mixed(scenarios: Sequence[Scenario]) -> Rate:
    return rate_of(sum(each.depends for each in scenarios), len(scenarios))
