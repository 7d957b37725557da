"""The edits a search chooses from: which settings each method has, between which bounds, and the edit that settings stand for.

Settings are a flat mapping, as Optuna keeps them: the method, and under `METHOD.NAME` the settings that method has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from .abliterate.activations import Activations, capture_inputs
from .abliterate.conditional import ConditionalFit, ConditionalSettings
from .abliterate.directions import Directions
from .abliterate.edit import Edit, Factor
from .abliterate.gated import GatedSettings, gated
from .abliterate.observed import Observed, Role, masks_by_role
from .abliterate.origin import EditOrigin
from .abliterate.project import project
from .abliterate.reading import Rows
from .errors import TrailmedError
from .fitting import find_directions
from .models.load import LoadedModel
from .progress import progress_bar
from .settings import SEARCHED, EditSettings, Method

Parameters = Mapping[str, Any]

_RIDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
"""Steps of about a factor of three, so that rows fitted for one trial serve others."""
_MOST_RANK = 16


class Suggesting(Protocol):
    """What suggests settings: an `optuna.Trial`."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Space:
    """The settings of `methods` for a model of `blocks` blocks, whose base over-refuses prompts enough for directions of `ranks` ranks."""

    methods: tuple[Method, ...]
    blocks: int
    ranks: int

    @property
    def conditional_blocks(self) -> range:
        """Blocks that the conditional edit may sit in: all but the lowest quarter, where help and refusal are not told apart yet."""
        return range(self.blocks // 4, self.blocks)

    def suggest(self, trial: Suggesting) -> None:
        """Have `trial` choose a method and its settings."""
        method = Method(trial.suggest_categorical("method", [str(each) for each in self.methods]))
        if method is Method.CONDITIONAL:
            trial.suggest_float("conditional.nats", 1.0, 20.0, log=True)
            trial.suggest_float("conditional.line", -4.0, 4.0)
            trial.suggest_categorical("conditional.ridge", _RIDGES)
            trial.suggest_categorical("conditional.gate_ridge", _RIDGES)
            trial.suggest_int("conditional.first_layer", self.conditional_blocks.start, self.blocks - 1)
            trial.suggest_int("conditional.layers", 1, len(self.conditional_blocks))
            return
        trial.suggest_float(f"{method}.alpha", 0.1, 3.0, log=True)
        trial.suggest_int(f"{method}.rank", 1, self.ranks)
        trial.suggest_int(f"{method}.first_layer", 0, self.blocks - 1)
        trial.suggest_int(f"{method}.layers", 1, self.blocks)
        if method is Method.GATED:
            trial.suggest_float("gated.ridge", 0.0001, 1.0, log=True)

    def defaults(self) -> list[dict[str, Any]]:
        """The settings that each method has outside of a search: good points to start from."""
        rank = min(EditSettings().rank, self.ranks)
        plain, usual, ridge = ConditionalSettings(), ConditionalSettings().layers(self.blocks), GatedSettings().ridge
        found: dict[Method, dict[str, Any]] = {
            Method.CONDITIONAL: {
                "nats": plain.nats, "line": 0.0, "ridge": plain.ridge, "gate_ridge": plain.gate_ridge,
                "first_layer": max(usual.start, self.conditional_blocks.start), "layers": len(usual),
            },
            Method.GATED: {"alpha": 1.0, "rank": rank, "first_layer": 0, "layers": self.blocks, "ridge": ridge},
            Method.PROJECT: {"alpha": 1.0, "rank": rank, "first_layer": 0, "layers": self.blocks},
        }
        return [
            {"method": str(method), **{f"{method}.{name}": value for name, value in found[method].items()}} for method in self.methods
        ]

    def edited_blocks(self, settings: Parameters) -> range:
        """The blocks that the settings of one method (without its name) choose; they end with the model."""
        return range(settings["first_layer"], min(self.blocks, settings["first_layer"] + settings["layers"]))


def settings_of(parameters: Parameters) -> tuple[Method, dict[str, Any]]:
    """The method, and its settings without its name. Raises ValueError for a method that is not searched."""
    method = next((each for each in SEARCHED if each == parameters.get("method")), None)
    if method is None:
        raise ValueError(f"{str(parameters.get('method'))[:40]!r} is no method that is searched")
    prefix = f"{method}."
    return method, {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class Learned:
    """What edits are fitted to: the fit prompts as `conditional` is shown them (`fit`), those the base was asked (`asked`), and the
    benchmark's own fit prompts (`shown`) with the activations they leave, which directions are taken from."""

    fit: Sequence[Observed]
    asked: Sequence[Observed]
    shown: Sequence[Observed]
    activations: Activations | None


class Candidates:
    """Makes edits of `model` from settings; what edits by one method share is computed once, when the first of them is made."""

    def __init__(
        self, model: LoadedModel, space: Space, learned: Learned, settings: EditSettings, origin: EditOrigin, *, progress: bool = True,
    ) -> None:
        self.space = space
        self._model, self._learned, self._settings, self._origin = model, learned, settings, origin
        self._progress = progress
        self._grams: dict[str, torch.Tensor] = {}
        self._rows: dict[tuple[int, float, float], Rows] = {}
        self._directions: dict[int, Directions] = {}

    @property
    def first_block(self) -> int:
        """No edit touches a block below it."""
        return 0 if {Method.GATED, Method.PROJECT} & {*self.space.methods} else self.space.conditional_blocks.start

    def prepare(self) -> None:
        """Compute what edits by the methods of `space` share, with a display of its own for each."""
        if Method.CONDITIONAL in self.space.methods:
            _ = self._conditional
        if Method.GATED in self.space.methods:
            _ = self._inputs

    def edit(self, parameters: Parameters, *, recipe: Mapping[str, Any] | None = None) -> Edit:
        """The edit of a trial; `recipe` joins its recipe. The same settings, the same bytes.

        Raises ValueError for settings that make no edit: foreign ones, or a strength at which factors are no finite numbers.
        """
        method, settings = settings_of(parameters)
        origin = replace(self._origin, recipe={**self._origin.recipe, **(recipe or {})})
        try:
            return self._made(method, settings, origin)
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no settings of {method}: {error}") from error

    def _made(self, method: Method, settings: Mapping[str, Any], origin: EditOrigin) -> Edit:
        blocks = self.space.edited_blocks(settings)
        if method is Method.CONDITIONAL:
            return self._conditional_edit(settings, blocks, origin)
        directions = self._found(settings["rank"])
        if method is Method.PROJECT:
            return project(self._model, directions, origin, alpha=settings["alpha"], layers=blocks)
        masks = masks_by_role(self._learned.asked, self._settings.removed)
        return gated(
            self._model, directions, self._inputs, masks[Role.OVER_REFUSED], masks[Role.COMPLIED] | masks[Role.KEPT_REFUSED],
            masks[Role.HARMFUL_REFUSED], origin, GatedSettings(alpha=settings["alpha"], ridge=settings["ridge"]), layers=blocks,
            grams=self._grams,
        )

    def _conditional_edit(self, settings: Mapping[str, Any], blocks: range, origin: EditOrigin) -> Edit:
        fit, chosen = self._conditional, ConditionalSettings(
            nats=settings["nats"], ridge=settings["ridge"], gate_ridge=settings["gate_ridge"],
        )
        for block in blocks:
            key = (block, chosen.ridge, chosen.gate_ridge)
            if key not in self._rows:
                self._rows[key] = fit.rows(chosen, [block])[block]
        rows = {block: self._rows[block, chosen.ridge, chosen.gate_ridge] for block in blocks}
        factors = fit.factors(rows, chosen.nats, settings["line"])
        said = {name: value for name, value in asdict(chosen).items() if name in ("nats", "ridge", "gate_ridge")}
        return origin.edit({name: Factor(b.float().numpy(), a.float().numpy()) for name, (b, a) in factors.items()}, {
            "method": "conditional", **said, "line": {"nats": settings["line"]}, "layers": list(blocks),
            "openings": [list(opening) for opening in fit.openings], "dtype": str(self._model.module.dtype).removeprefix("torch."),
        })

    def _found(self, rank: int) -> Directions:
        if rank not in self._directions:
            if self._learned.activations is None:
                raise ValueError("the method is not one of this search")
            chosen = replace(self._settings, method=Method.PROJECT, rank=rank)
            self._directions[rank] = find_directions(self._learned.activations, self._learned.shown, chosen)
        return self._directions[rank]

    @cached_property
    def _conditional(self) -> ConditionalFit:
        blocks = self.space.conditional_blocks
        return ConditionalFit(self._model, self._learned.fit, self._settings.removed, blocks, progress=self._progress)

    @cached_property
    def _inputs(self) -> dict[str, torch.Tensor]:
        """What the residual writers read at the last token of the prompts asked."""
        names = [name for block in range(self.space.blocks) for name in self._model.architecture.residual_writers(block)]
        with progress_bar("inputs of the writers", len(self._learned.asked), enabled=self._progress) as advance:
            return capture_inputs(self._model, [prompt.token_ids for prompt in self._learned.asked], names, progress=advance)


def most_rank(shown: Sequence[Observed], removed: Sequence[str]) -> int:
    """The highest rank of directions taken from `shown`. Raises `TrailmedError` when the base over-refuses none of them."""
    over_refused = int(masks_by_role(shown, removed)[Role.OVER_REFUSED].sum())
    if not over_refused:
        raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
    return min(_MOST_RANK, over_refused)
