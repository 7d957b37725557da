"""Roles: a truth table, and that every prompt has exactly one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trailmed.abliterate.observed import Observed, Role, masks_by_role, role_of


def observed(category: str, *, should_refuse: bool, refused: bool) -> Observed:
    return Observed("p", category, should_refuse, (1, 2), (3,), refused)


@pytest.mark.parametrize(
    ("category", "should_refuse", "refused", "role"), [
        ("water", False, True, Role.OVER_REFUSED),
        ("water", False, False, Role.COMPLIED),
        ("fire", False, True, Role.KEPT_REFUSED),
        ("fire", False, False, Role.COMPLIED),
        ("harm", True, True, Role.HARMFUL_REFUSED),
        ("harm", True, False, Role.HARMFUL_COMPLIED),
        ("water", True, True, Role.HARMFUL_REFUSED),  # what shall be refused is never over-refused, whatever its category
        ("water", True, False, Role.HARMFUL_COMPLIED),
    ],
)
def test_roles_when_water_is_removed(category: str, should_refuse: bool, refused: bool, role: Role) -> None:
    assert role_of(observed(category, should_refuse=should_refuse, refused=refused), ("water", "snow")) is role


def test_nothing_removed_means_nothing_over_refused() -> None:
    assert role_of(observed("water", should_refuse=False, refused=True), ()) is Role.KEPT_REFUSED


@given(st.lists(st.builds(observed, st.sampled_from(["water", "fire", "harm"]), should_refuse=st.booleans(), refused=st.booleans())))
def test_masks_part_the_prompts(prompts: list[Observed]) -> None:
    masks = masks_by_role(prompts, {"water"})
    assert set(masks) == set(Role)
    assert all(mask.dtype == torch.bool and mask.shape == (len(prompts),) for mask in masks.values())
    for index, prompt in enumerate(prompts):
        assert [role for role, mask in masks.items() if mask[index]] == [role_of(prompt, {"water"})]
