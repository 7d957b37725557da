"""What the base model itself did with a prompt, and the classes an edit is fitted to.

An edit is fitted to behaviour and not to intentions: a benign prompt that the base answers is something to keep, and only one that
it refuses is something to change (Arditi et al. 2024 filter their prompts the same way).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


class Role(StrEnum):
    """What an edit does with a prompt."""

    OVER_REFUSED = "over_refused"
    """Benign, of a removed category, refused by the base: shall be answered."""
    COMPLIED = "complied"
    """Benign and answered: stays as it is."""
    KEPT_REFUSED = "kept_refused"
    """Benign and refused, but of a category that is not removed: stays as it is."""
    HARMFUL_REFUSED = "harmful_refused"
    """Harmful and refused: stays as it is."""
    HARMFUL_COMPLIED = "harmful_complied"
    """Harmful and answered: stays out of every class, or is taught to be refused (`distill`'s and `conditional`'s repair)."""
    UNASKED = "unasked"
    """Not put to the base, benign or harmful: shows `conditional` what a request is, not what the base does with it."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A prompt under its chat template and the base's greedy answer to it.

    `token_ids` are the prompt's, `answer` the answer's (an end token, where there is one, included); `refused` is the judge's word on it.
    Where the base was not `asked`, there is no answer and it counts as none that was refused.
    Prompts of one `scenario` are paraphrases: cross-validation keeps them together.
    """

    id: str
    category: str
    should_refuse: bool
    token_ids: tuple[int, ...]
    answer: tuple[int, ...]
    refused: bool
    scenario: str = ""
    asked: bool = True


def role_of(prompt: Observed, removed: Collection[str]) -> Role:
    """The prompt's part in an edit that removes the refusals of the categories `removed`."""
    if not prompt.asked:
        return Role.UNASKED
    if prompt.should_refuse:
        return Role.HARMFUL_REFUSED if prompt.refused else Role.HARMFUL_COMPLIED
    if not prompt.refused:
        return Role.COMPLIED
    return Role.OVER_REFUSED if prompt.category in removed else Role.KEPT_REFUSED


def masks_by_role(prompts: Sequence[Observed], removed: Collection[str]) -> Mapping[Role, torch.Tensor]:
    """For every role a bool tensor [n]: which of `prompts` have it."""
    roles = [role_of(prompt, removed) for prompt in prompts]
    return {role: torch.tensor([each is role for each in roles], dtype=torch.bool) for role in Role}


def refusal_at_stake(prompts: Sequence[Observed], removed: Collection[str]) -> list[Observed]:
    """Those of `prompts` that the base refuses or should refuse: all but the benign ones that it answers, and those it was not asked."""
    return [prompt for prompt in prompts if role_of(prompt, removed) not in (Role.COMPLIED, Role.UNASKED)]


def evenly_spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of `items`, evenly spread, in their order."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
