"""Directional ablation of the matrices that write to the residual stream: `project` and its norm-preserving variant `biproject`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import TrailmedError
from ..models.architecture import Architecture
from .directions import Directions
from .edit import Edit, Factor
from .origin import EditOrigin

COMPONENTS = ("o_proj", "down_proj")
"""The matrices of a block whose outputs are added to the residual stream."""


class HasArchitecture(Protocol):
    """A module and the map of its tensors, such as `LoadedModel`."""

    @property
    def module(self) -> Any: ...
    @property
    def architecture(self) -> Architecture: ...


def project(
    model: HasArchitecture, directions: Directions, origin: EditOrigin, *, alpha: float = 1.0, layers: Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS, preserve_norm: bool = False,
) -> Edit:
    """W' = W − α RᵀR W for every residual writer W [d, d_in] of the chosen blocks: B = −α Rᵀ, A = R W (Arditi et al. 2024, §4.1).

    R [≤ k, d] are the orthonormal rows of `directions.basis[i + 1]`, the stream after block i (counted from 0), for both of block i's
    writers; a block without a direction is left alone. `layers` are block numbers (None: all), `components` a choice of
    `COMPONENTS`. With `preserve_norm` each row of W' is scaled back to its norm in W (`biproject`; Lai 2025, norm-preserving
    biprojected abliteration), which gives back some of the component along R.

    The embedding matrix and biases are left alone: where the embedding is tied to the output, editing it would change the logits
    directly, and what the stream holds before the first block is not refusal yet. Where a norm stands between a writer and the
    stream (Gemma's post norms), R is taken out before that norm, as the literature does.

    Raises ValueError for an unknown component or block or an α that is no finite number; `TrailmedError` when no chosen block has a
    direction, or the directions were taken from a model of another shape.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"cannot project with alpha = {alpha}")
    weights = model.module.state_dict()
    factors = {}
    edited_layers = set()
    for layer, name, rows in edited_writers(model, directions, layers, components):
        weight = weights[name].detach().cpu().double()
        b, a = (-alpha * rows.double().mT).float().numpy(), (rows.double() @ weight).float().numpy()
        factors[name] = Factor(b, a, _restoring_scale(weight.numpy(), b, a) if preserve_norm else None)
        edited_layers.add(layer)
    return origin.edit(factors, {
        "method": "biproject" if preserve_norm else "project", "alpha": alpha, "layers": sorted(edited_layers),
        "components": list(components), **direction_recipe(directions),
    })


def edited_writers(
    model: HasArchitecture, directions: Directions, layers: Iterable[int] | None, components: Sequence[str],
) -> list[tuple[int, str, torch.Tensor]]:
    """(block, `state_dict()` name of a residual writer, R float32 [≤ k, d]) of everything an edit along `directions` touches.

    Errors as in `project`.
    """
    config = model.module.config.get_text_config()
    if (directions.layers, directions.basis.shape[2]) != (config.num_hidden_layers, config.hidden_size):
        raise TrailmedError(
            f"the directions are for {directions.layers} layers of width {directions.basis.shape[2]}, the model has "
            f"{config.num_hidden_layers} of width {config.hidden_size}; take them from this model"
        )
    if unknown := [component for component in components if component not in COMPONENTS]:
        raise ValueError(f"unknown component {unknown[0]!r}; choose from {', '.join(COMPONENTS)}")
    chosen = sorted(set(range(directions.layers) if layers is None else layers))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < directions.layers:
        raise ValueError(f"there is no such block among {chosen}; the model has 0 to {directions.layers - 1}")
    writers = []
    for layer in chosen:
        rows = directions.at(layer + 1)
        if len(rows):
            writers += [(layer, name, rows) for name in written_names(model.architecture, layer, components)]
    if not writers:
        raise TrailmedError("there is nothing to edit: no chosen layer has a direction; choose other layers, or take directions anew")
    return writers


def written_names(architecture: Architecture, block: int, components: Collection[str] = COMPONENTS) -> list[str]:
    """`state_dict()` names of the residual writers of `block` (0-based) that `components` choose."""
    return [name for name in architecture.residual_writers(block) if name.split(".")[-2] in components]


def direction_recipe(directions: Directions) -> Mapping[str, Any]:
    """What a recipe says about the directions an edit was made with."""
    return {"directions": asdict(directions.settings), "directions_prompts_sha256": directions.prompts_sha256}


def _restoring_scale(
    weight: npt.NDArray[np.float64], b: npt.NDArray[np.float32], a: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """float32 [d_out]: each row's norm in W over its norm in W + B A; 1 for a row that is gone, which no scale brings back."""
    before = np.linalg.norm(weight, axis=1)
    after = np.linalg.norm(weight + b.astype(np.float64) @ a, axis=1)
    gone = after <= np.finfo(np.float32).eps * before
    return np.where(gone, 1.0, before / np.where(gone, 1.0, after)).astype(np.float32)
