"""Refusal directions in the residual stream: difference of means and the ingredients that refine it.

The recipe is that of Arditi et al. 2024 (arXiv:2406.11717): the mean activation of refused prompts minus that of complied ones, per
layer. Wang et al. 2024 (arXiv:2410.03415) make the false-refusal direction orthogonal to the true one; Lai 2025 ("projected
abliteration") winsorizes and takes out the component along the harmless mean.

L below is layers + 1: index 0 is the embeddings' output, l the stream after layer l. Functions on tensors compute in float64 and
give back their first argument's dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..errors import TrailmedError
from .activations import Activations
from .tensor_file import read_tensor, write_tensor

Mask = torch.Tensor | Sequence[bool]
"""bool [n]: which prompts belong to a class."""

_FORMAT = 1
_KIND = "directions"
_ZERO = 1e-6
"""Differences below this share of the activations' norm are float32 rounding, not a direction."""
_ORTHONORMAL = 1e-4
_MIDDLE = (0.2, 0.8)


@dataclass(frozen=True, slots=True)
class DirectionSettings:
    """The ingredients of a direction, each a switch. Raises ValueError for a value out of range."""

    chat_template: bool = field(
        default=True, metadata={"help": "take activations of the chat-templated prompt (the caller encodes; recorded here)"},
    )
    winsorize_quantile: float = field(
        default=0.995, metadata={"help": "clip activations at this quantile of |a| per layer; 1 clips nothing"},
    )
    gram_schmidt: bool = field(
        default=True, metadata={"help": "take out the component along the mean of complied prompts (two passes)"},
    )
    orthogonalize_harmful: float = field(
        default=1.0, metadata={"help": "share of the component along the harmful-refusal direction to take out: 0 none, 1 all"},
    )
    rank: int = field(default=1, metadata={"help": "number of directions per layer; 1 is the difference of means"})
    subspace: Literal["differences", "categories"] = field(
        default="differences",
        metadata={"help": "with rank > 1, SVD of each over-refused prompt's difference, or of one difference of means per category"},
    )
    layer: Literal["per_layer"] | int = field(
        default="per_layer",
        metadata={"help": "per_layer: each layer its own direction; a number: that layer's everywhere (0 = embeddings, l = after layer l)"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.winsorize_quantile <= 1:
            raise ValueError(f"winsorize_quantile is {self.winsorize_quantile}; it must be above 0 and at most 1")
        if not (math.isfinite(self.orthogonalize_harmful) and 0 <= self.orthogonalize_harmful <= 1):
            raise ValueError(f"orthogonalize_harmful is {self.orthogonalize_harmful}; it must be between 0 and 1")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1")
        if self.subspace not in ("differences", "categories"):
            raise ValueError(f"subspace is {self.subspace!r}; it must be differences or categories")
        if self.layer != "per_layer" and (not isinstance(self.layer, int) or self.layer < 0):
            raise ValueError(f"layer is {self.layer!r}; it must be per_layer or an index from 0")


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = Field(ge=_FORMAT, le=_FORMAT)
    prompts_sha256: str = Field(pattern="^([0-9a-f]{64})?$")
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """A subspace of the residual stream per layer.

    `basis` is float32 [layers + 1, k, d] with orthonormal rows, or zero rows where the classes do not differ (index 0 under a chat
    template: every prompt ends in the same token). Raises ValueError for another shape or dtype, or other rows.
    """

    basis: torch.Tensor
    settings: DirectionSettings = DirectionSettings()
    prompts_sha256: str = ""

    def __post_init__(self) -> None:
        if self.basis.ndim != 3 or self.basis.shape[0] < 2 or 0 in self.basis.shape:
            raise ValueError(f"a basis has the shape [layers + 1, k, d], not {list(self.basis.shape)}")
        if self.basis.dtype != torch.float32:
            raise ValueError(f"a basis is float32, not {self.basis.dtype}")
        gram = self.basis.double() @ self.basis.double().mT
        expected = torch.diag_embed((torch.diagonal(gram, dim1=1, dim2=2) > 0.5).double())
        if not bool(((gram - expected).abs() <= _ORTHONORMAL).all()):
            raise ValueError("the rows of a basis are orthonormal, or zero")
        _Header(format=_FORMAT, prompts_sha256=self.prompts_sha256, settings={})

    @property
    def layers(self) -> int:
        """Number of layers (the basis has one entry more)."""
        return self.basis.shape[0] - 1

    def at(self, layer: int) -> torch.Tensor:
        """The orthonormal rows at index `layer`, float32 [≤ k, d]: zero rows left out, so there may be none."""
        rows = self.basis[layer]
        return rows[rows.any(dim=1)]

    def save(self, path: Path) -> None:
        """Write safetensors with a JSON header: the same directions, the same bytes."""
        write_tensor(path, _KIND, self.basis, _Header(format=_FORMAT, prompts_sha256=self.prompts_sha256, settings=asdict(self.settings)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, trusting nothing in it. Raises `TrailmedError` for a missing, foreign or damaged file."""
        return read_tensor(path, _KIND, _Header, lambda basis, header: cls(basis, _settings(header.settings), header.prompts_sha256))


def class_mask(mask: Mask, n: int, name: str, *, required: bool = True) -> torch.Tensor:
    """`mask` as a bool tensor [n].

    Raises ValueError for another dtype or shape, `TrailmedError` when the class `name` is empty although it is `required`.
    """
    checked = torch.as_tensor(mask)
    if checked.dtype != torch.bool or checked.shape != (n,):
        raise ValueError(f"the mask of {name} prompts is bool [{n}], not {checked.dtype} {list(checked.shape)}")
    if required and not checked.any():
        raise TrailmedError(f"there is no {name} prompt among the {n}; give prompts of that kind, or leave this method out")
    return checked


def winsorize(acts: torch.Tensor, quantile: float) -> torch.Tensor:
    """`acts` [n, L, d] clipped per layer to ±t, t the least |a| of that layer that at least `quantile` of all its |a| do not exceed.

    An order statistic and no interpolation, so that clipping twice is clipping once. Lai 2025. Raises ValueError unless
    0 < quantile ≤ 1.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"there is no quantile {quantile}")
    clipped = acts.clone()
    for layer in range(acts.shape[1]):
        magnitudes = acts[:, layer].abs().flatten()
        bound = magnitudes.kthvalue(min(len(magnitudes), max(1, math.ceil(quantile * len(magnitudes))))).values
        clipped[:, layer].clamp_(-bound, bound)
    return clipped


def mean_difference(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Mean of `positive` [n₊, L, d] minus mean of `negative` [n₋, L, d]: [L, d], not normalized. Arditi et al. 2024, §2.3."""
    return (positive.double().mean(0) - negative.double().mean(0)).to(positive.dtype)


def per_category_directions(acts: torch.Tensor, over_refused: Mapping[str, Mask], complied: Mask) -> dict[str, torch.Tensor]:
    """Per category, the mean of its over-refused prompts minus the mean of all complied ones: [L, d] each, not normalized.

    `acts` is [n, L, d], the masks bool [n]. Raises `TrailmedError` for a category without over-refused prompts.
    """
    negative = acts[class_mask(complied, len(acts), "complied")]
    return {
        category: mean_difference(acts[class_mask(mask, len(acts), f"over-refused {category}")], negative)
        for category, mask in over_refused.items()
    }


def orthogonalize(direction: torch.Tensor, against: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """`direction` [..., d] less `strength` times its component along `against` [..., d] (broadcast; zero vectors take out nothing).

    At strength 1 the result is orthogonal to `against`; at λ < 1 a share 1 − λ of the component stays (Wang et al. 2024, §3).
    """
    wide, unit = direction.double(), normalize(against.double())
    component = (wide * unit).sum(-1, keepdim=True) * unit
    rest = wide - component
    # Second pass: when the two are nearly parallel, the first one's rounding error is large beside what is left.
    rest = rest - (rest * unit).sum(-1, keepdim=True) * unit
    return (rest + (1 - strength) * component).to(direction.dtype)


def gram_schmidt_two_pass(direction: torch.Tensor, harmless_mean: torch.Tensor) -> torch.Tensor:
    """`direction` [..., d] made orthogonal to `harmless_mean` [..., d] by Gram–Schmidt with reorthogonalization.

    Keeps an ablation from moving what harmless prompts share (Lai 2025, projected abliteration).
    """
    return orthogonalize(direction, harmless_mean)


def normalize(vectors: torch.Tensor) -> torch.Tensor:
    """`vectors` [..., d] at length 1; zero vectors stay zero."""
    norms = vectors.double().norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, vectors.double() / torch.where(norms > 0, norms, 1), 0).to(vectors.dtype)


def subspace(rows: torch.Tensor, k: int) -> torch.Tensor:
    """The k leading right singular vectors of `rows` [m, L, d] per layer: [L, k, d], strongest first.

    `rows` are differences between prompts (or categories) and a class mean; they are not centred, so the first vector is near their
    mean. Each vector's sign is such that the rows' sum has no negative component along it. Where the rows span fewer than k
    dimensions, the last vectors are zero.
    """
    stacked = rows.double().transpose(0, 1)
    _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
    along_sum = (vectors * stacked.sum(1, keepdim=True)).sum(-1, keepdim=True)
    vectors = torch.where(along_sum < 0, -vectors, vectors)
    vectors = torch.where((values > _ZERO * values[:, :1])[..., None], vectors, 0)
    basis = torch.zeros(stacked.shape[0], k, stacked.shape[2], dtype=torch.float64)
    kept = min(k, vectors.shape[1])
    basis[:, :kept] = vectors[:, :kept]
    return basis.to(rows.dtype)


def cohens_d(positive: torch.Tensor, negative: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Cohen's d per layer of the two classes' components along `direction`: [L], in pooled standard deviations.

    `positive` is [n₊, L, d], `negative` [n₋, L, d], both n ≥ 2, `direction` [L, d] of any length. Where no prompt varies, d is 0 if the
    means are equal too, else infinite. Raises ValueError for a class of one.
    """
    if min(len(positive), len(negative)) < 2:
        raise ValueError("Cohen's d needs two prompts of each class")
    unit = normalize(direction.double())
    first, second = ((acts.double() * unit).sum(-1) for acts in (positive, negative))
    difference = first.mean(0) - second.mean(0)
    squares = (len(first) - 1) * first.var(0) + (len(second) - 1) * second.var(0)
    deviation = (squares / (len(first) + len(second) - 2)).sqrt()
    return torch.where(difference == 0, 0, difference / deviation).to(positive.dtype)


def best_layer(acts: Activations, positive: Mask, negative: Mask) -> int:
    """The layer where the classes stand farthest apart: the largest Cohen's d along that layer's difference of means.

    The index is that of `Activations.residual`, never 0. Only the middle 60 % of the layers are candidates: early ones tell words
    apart and the last ones the next token (Arditi et al. 2024 leave out the last 20 %). Measured on the same prompts the direction
    is taken from, so d is too large everywhere; only its order is used. Raises `TrailmedError` for a class of fewer than two
    prompts.
    """
    n = len(acts.residual)
    masks = [class_mask(mask, n, name) for mask, name in ((positive, "positive"), (negative, "negative"))]
    if min(int(mask.sum()) for mask in masks) < 2:
        raise TrailmedError("choosing a layer needs two prompts of each class; give more prompts, or name a layer")
    first, second = (acts.residual[mask] for mask in masks)
    separation = cohens_d(first, second, mean_difference(first, second))
    low = max(1, math.ceil(_MIDDLE[0] * acts.layers))
    high = max(low, math.floor(_MIDDLE[1] * acts.layers))
    return low + int(separation[low : high + 1].argmax())


def compute_directions(
    acts: Activations, over_refused: Mask, complied: Mask, harmful_refused: Mask, settings: DirectionSettings, *,
    categories: Sequence[str] | None = None,
) -> Directions:
    """Over-refusal directions by `settings`: differences, less the harmless mean, less the harmful direction, then SVD.

    The masks are bool [n]; `categories` names each prompt's category, for `subspace="categories"`. All classes are winsorized
    together. The harmful direction is the harmful-refused mean minus the complied mean, treated by Gram–Schmidt likewise, so that
    the result is orthogonal to both at full strength.

    Raises `TrailmedError` for an empty class that the settings need, fewer prompts (categories) than the rank, or a layer that the
    model does not have; ValueError for masks of another shape or dtype, or absent `categories`.
    """
    n, layers = len(acts.residual), acts.layers
    refused_mask, complied_mask = class_mask(over_refused, n, "over-refused"), class_mask(complied, n, "complied")
    if settings.layer != "per_layer" and settings.layer > layers:
        raise TrailmedError(f"layer {settings.layer}: the model has {layers} layers; choose 0 to {layers}, or per_layer")
    residual = winsorize(acts.residual, settings.winsorize_quantile).double()
    negative = residual[complied_mask]
    harmless_mean = negative.mean(0)
    rows = _difference_rows(residual, refused_mask, complied_mask, settings, categories)
    if settings.gram_schmidt:
        rows = gram_schmidt_two_pass(rows, harmless_mean)
    if settings.orthogonalize_harmful > 0:
        harmful = mean_difference(residual[class_mask(harmful_refused, n, "refused harmful")], negative)
        if settings.gram_schmidt:
            harmful = gram_schmidt_two_pass(harmful, harmless_mean)
        harmful = torch.where(_is_rounding(harmful, harmless_mean), 0, harmful)
        rows = orthogonalize(rows, harmful, settings.orthogonalize_harmful)
    rows = torch.where(_is_rounding(rows, harmless_mean), 0, rows)
    basis = subspace(rows, settings.rank)
    if settings.layer != "per_layer":
        basis = basis[settings.layer].expand_as(basis)
    if not basis.any():
        raise TrailmedError("over-refused and complied prompts do not differ there; choose another layer, or other prompts")
    return Directions(basis.float().contiguous(), settings, acts.prompts_sha256)


def _settings(values: Mapping[str, Any]) -> DirectionSettings:
    if unknown := values.keys() - DirectionSettings.__dataclass_fields__.keys():
        raise ValueError(f"unknown setting {min(unknown)!r}")
    return TypeAdapter(DirectionSettings).validate_json(json.dumps(values), strict=True)


def _difference_rows(
    residual: torch.Tensor, over_refused: torch.Tensor, complied: torch.Tensor, settings: DirectionSettings,
    categories: Sequence[str] | None,
) -> torch.Tensor:
    """[m, L, d]: what the subspace is taken of. For rank 1 the one difference of means."""
    if settings.rank == 1:
        return mean_difference(residual[over_refused], residual[complied])[None]
    if settings.subspace == "differences":
        rows = residual[over_refused] - residual[complied].mean(0)
    else:
        if categories is None or len(categories) != len(residual):
            raise ValueError("subspace='categories' needs each prompt's category")
        masks = {
            category: over_refused & torch.tensor([name == category for name in categories])
            for category in sorted(set(categories))
        }
        present = {category: mask for category, mask in masks.items() if mask.any()}
        rows = torch.stack(list(per_category_directions(residual, present, complied).values()))
    if len(rows) < settings.rank:
        what = "over-refused prompts" if settings.subspace == "differences" else "categories with over-refused prompts"
        raise TrailmedError(f"rank {settings.rank} needs that many {what}, there are {len(rows)}; choose a lower rank")
    return rows


def _is_rounding(rows: torch.Tensor, harmless_mean: torch.Tensor) -> torch.Tensor:
    """bool [..., L, 1]: which of `rows` [..., L, d] are nothing but rounding beside the activations."""
    return torch.le(rows.norm(dim=-1, keepdim=True), _ZERO * harmless_mean.norm(dim=-1, keepdim=True))
