"""The gated edit: a direction is taken out only for inputs of over-refused prompts, in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from ..progress import Advance, no_progress
from .directions import Directions, Mask, class_mask
from .edit import Edit, Factor
from .origin import EditOrigin
from .project import COMPONENTS, HasArchitecture, direction_recipe, edited_writers


@dataclass(frozen=True, slots=True)
class GatedSettings:
    """How the gate is fitted. A class's weight is its share in the loss, however many prompts it has. Raises ValueError out of range."""

    alpha: float = field(default=1.0, metadata={"help": "strength: 1 moves over-refused prompts onto the mean of complied ones"})
    ridge: float = field(default=0.01, metadata={"help": "regularization, relative to the mean squared norm of the inputs"})
    over_refused_weight: float = field(default=1.0, metadata={"help": "weight of over-refused prompts, which shall change"})
    complied_weight: float = field(default=1.0, metadata={"help": "weight of complied prompts, which shall stay"})
    harmful_refused_weight: float = field(default=1.0, metadata={"help": "weight of refused harmful prompts, which shall stay"})

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha is {self.alpha}; it must be a finite number")
        for name in ("ridge", "over_refused_weight", "complied_weight", "harmful_refused_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a positive number")


def gated(
    model: HasArchitecture, directions: Directions, inputs: Mapping[str, torch.Tensor], over_refused: Mask, complied: Mask,
    harmful_refused: Mask, origin: EditOrigin, settings: GatedSettings = GatedSettings(), *, layers: Iterable[int] | None = None,
    components: Sequence[str] = COMPONENTS, grams: dict[str, torch.Tensor] | None = None, progress: Advance = no_progress,
) -> Edit:
    """W' = W − α Rᵀ G, where G [k, d_in] maps inputs of over-refused prompts to what ablation would take out of W x, others to 0.

    For every residual writer W [d, d_in] that `layers` and `components` choose (as in `project`), `inputs` holds, under its
    `state_dict()` name, float32 [n, d_in] or [n, positions, d_in] from `capture_inputs`; the masks are bool [n] and prompts in none
    of them are left out. G minimizes Σ wᵢ |G xᵢ − tᵢ|² + λ |G|² with t = R W x − (mean of R W x over complied prompts at the same
    position) for over-refused prompts and 0 for the others; λ is `ridge` times the weighted mean of |x|². Each tensor is fitted by
    itself, to the inputs of the unedited model. `progress` counts tensors. What takes longest does not depend on settings or directions:
    given `grams`, X Xᵀ of each tensor is taken from there, or computed and left there for the next call with the same inputs and masks.

    A ridge regression against kept keys as in ROME (Meng et al. 2022, arXiv:2202.05262) and AlphaEdit (Fang et al. 2024,
    arXiv:2410.02355), with the output confined to the refusal directions; nothing but that subspace can change.

    Raises as `project`; ValueError also for inputs that are absent, of another shape, or all zero, or a prompt in two classes;
    `TrailmedError` when no prompt is over-refused, or none complied (refused harmful ones may be absent).
    """
    writers = edited_writers(model, directions, layers, components)
    absent = [name for _, name, _ in writers if name not in inputs]
    if absent:
        raise ValueError(f"no inputs of {absent[0]}")
    n = len(inputs[writers[0][1]])
    classes = [
        class_mask(over_refused, n, "over-refused"), class_mask(complied, n, "complied"),
        class_mask(harmful_refused, n, "refused harmful", required=False),
    ]
    if int(torch.stack(classes).sum(0).max()) > 1:
        raise ValueError("a prompt belongs to one class only")
    shares = (settings.over_refused_weight, settings.complied_weight, settings.harmful_refused_weight)
    prompt_weights = sum(
        (mask.double() * (share / max(1, int(mask.sum()))) for mask, share in zip(classes, shares, strict=True)), start=torch.zeros(n),
    )
    weights = model.module.state_dict()
    factors = {}
    for _, name, rows in writers:
        weight = weights[name].detach().cpu()
        x = inputs[name][:, None] if inputs[name].ndim == 2 else inputs[name]
        if x.shape[0] != n or x.ndim != 3 or x.shape[2] != weight.shape[1]:
            raise ValueError(f"inputs of {name} have the shape {list(inputs[name].shape)}, not [{n}, {weight.shape[1]}]")
        components_along = x.double() @ (rows.double() @ weight.double()).mT
        targets = (components_along - components_along[classes[1]].mean(0)) * classes[0][:, None, None]
        used = prompt_weights > 0
        rows_read = x[used].flatten(0, 1)
        gram = None if grams is None else grams.get(name)
        if gram is None and grams is not None:
            gram = grams[name] = rows_read.double() @ rows_read.double().mT
        gate = ridge_gate(
            rows_read, targets[used].flatten(0, 1), prompt_weights[used].repeat_interleave(x.shape[1]), settings.ridge, gram,
        )
        factors[name] = Factor((-settings.alpha * rows.double().mT).float().numpy(), gate.float().numpy())
        progress(1)
    return origin.edit(factors, {
        "method": "gated", **asdict(settings), "layers": sorted({layer for layer, _, _ in writers}), "components": list(components),
        **direction_recipe(directions),
    })


def ridge_gate(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, ridge: float, gram: torch.Tensor | None = None,
) -> torch.Tensor:
    """G float64 [k, d_in] that minimizes Σ wᵢ |G xᵢ − tᵢ|² + λ |G|², λ = ridge · Σ wᵢ |xᵢ|² / n, weights scaled to mean 1.

    `inputs` is [n, d_in], `targets` [n, k], `weights` [n] (positive), `gram` the inputs' products with each other,
    float64 [n, n], where they are known. Solved in sample space, where the system is n × n and not d_in × d_in: with X = √w x and
    T = √w t, Gᵀ = Xᵀ (X Xᵀ + λ 1)⁻¹ T, the same G as (Xᵀ X + λ 1) Gᵀ = Xᵀ T. Raises ValueError when all inputs are zero.
    """
    root = (weights.double() / weights.double().mean()).sqrt()[:, None]
    x, t = inputs.double() * root, targets.double() * root
    gram = x @ x.mT if gram is None else root * gram * root.mT
    penalty = ridge * gram.diagonal().mean()
    if penalty <= 0:
        raise ValueError("all inputs are zero; there is nothing to gate on")
    gram.diagonal().add_(penalty)
    return torch.cholesky_solve(t, torch.linalg.cholesky(gram)).mT @ x
