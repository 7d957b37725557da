"""`EditOrigin`: what the caller knows about an edit and a method does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .edit import Edit, Factor


@dataclass(frozen=True, slots=True)
class EditOrigin:
    """The base model, the categories and the seed an edit is made for; fields are those of `Edit`.

    `recipe` holds what the caller did before the method ran (prompt sets, splits); the method adds its name and settings.
    """

    fingerprint: str
    base_sha256: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    seed: int = 0

    def edit(self, factors: Mapping[str, Factor], recipe: Mapping[str, Any]) -> Edit:
        """The `Edit` of `factors` (by Hugging Face tensor name), `recipe` (method and settings) joined with the caller's.

        Raises ValueError as `Edit` does.
        """
        return Edit(
            factors=factors, fingerprint=self.fingerprint, base_sha256=self.base_sha256, recipe={**self.recipe, **recipe},
            removed=self.removed, kept=self.kept, seed=self.seed,
        )
