"""`Edit`: a low-rank change to a model's weights, W' = W + B A, as a value that can be saved, scaled, joined and baked."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import TrailmedError
from ..files import write_atomically

Matrix = npt.NDArray[np.float32]

_HEADER_KEY = "trailmed.edit"
_FORMAT = 1
_PARTS = ("b", "a", "row_scale")
_MAX_TENSORS = 1 << 16
_MAX_HEADER_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One tensor's edit: W' = diag(row_scale) (W + B A), with W [d_out, d_in].

    `b` is float32 [d_out, k], `a` float32 [k, d_in], `row_scale` float32 [d_out] or None for all ones. The arrays are made
    read-only. Raises ValueError for shapes that do not fit together, other dtypes, or values that are no finite numbers.
    """

    b: Matrix
    a: Matrix
    row_scale: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0] or 0 in (*self.b.shape, *self.a.shape):
            raise ValueError(f"factors of shapes {self.b.shape} and {self.a.shape} have no product")
        if self.row_scale is not None and self.row_scale.shape != self.b.shape[:1]:
            raise ValueError(f"row scale of shape {self.row_scale.shape} does not fit factors of {self.b.shape[0]} rows")
        for part in _PARTS:
            array = getattr(self, part)
            if array is None:
                continue
            if array.dtype != np.float32:
                raise ValueError(f"{part} is {array.dtype}, not float32")
            if not np.isfinite(array).all():
                raise ValueError(f"{part} holds values that are no finite numbers")
            owned = np.array(array, order="C", copy=True)
            owned.flags.writeable = False
            object.__setattr__(self, part, owned)

    @property
    def shape(self) -> tuple[int, int]:
        """[d_out, d_in] of the tensor it edits."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """k, the number of columns of B."""
        return len(self.a)

    def delta(self) -> Matrix:
        """B A, float32 [d_out, d_in] (without the row scale)."""
        return self.b @ self.a

    def apply_to(self, weight: Matrix) -> Matrix:
        """W' for `weight` float32 [d_out, d_in], as a new array. Raises ValueError when the shape is another."""
        if weight.shape != self.shape:
            raise ValueError(f"the edit is for a tensor of shape {self.shape}, not {weight.shape}")
        return self.apply_to_rows(weight, 0)

    def apply_to_rows(self, rows: Matrix, start: int) -> Matrix:
        """W'[start : start + n] for `rows` = W[start : start + n], float32 [n, d_in], as a new array."""
        stop = start + len(rows)
        edited: Matrix = self.b[start:stop] @ self.a
        edited += rows
        if self.row_scale is not None:
            edited *= self.row_scale[start:stop, None]
        return edited


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """Factors by Hugging Face tensor name, and what is needed to repeat and to check the edit.

    `fingerprint` is `models.fingerprint.fingerprint` of the base model; `base_sha256` the hash of the file it was fitted on;
    `recipe` any JSON object (method and settings); `removed` and `kept` name categories. Raises ValueError for an edit without factors,
    malformed hashes, or a recipe that is no plain JSON.
    """

    factors: Mapping[str, Factor]
    fingerprint: str
    base_sha256: str
    recipe: Mapping[str, Any]
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("an edit without factors changes nothing")
        header = _Header.model_validate(self._header())
        json.dumps(header.recipe, allow_nan=False)
        object.__setattr__(self, "factors", MappingProxyType({name: self.factors[name] for name in sorted(self.factors)}))
        object.__setattr__(self, "recipe", MappingProxyType(dict(self.recipe)))

    @property
    def size(self) -> int:
        """Number of parameters: all elements of all factors."""
        return sum(part.size for factor in self.factors.values() for part in (factor.b, factor.a, factor.row_scale) if part is not None)

    @property
    def sha256(self) -> str:
        """Hex sha256 of the content: that of the file `save` writes."""
        return hashlib.sha256(self._to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write safetensors (`NAME.b`, `NAME.a`, `NAME.row_scale`) with one JSON header: the same edit, the same bytes."""
        with write_atomically(path) as scratch:
            scratch.write_bytes(self._to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, trusting nothing in it.

        Raises `TrailmedError` when the file is missing, no safetensors, no edit of ours, or has other dtypes, shapes that do
        not fit, or values that are no finite numbers.
        """
        if not path.is_file():
            raise TrailmedError(f"{path}: no such file; name an edit.safetensors")
        try:
            return cls(**_read(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "header"
            raise TrailmedError(f"{path}: not a trailmed edit ({where}: {first['msg']}); make it with `trailmed edit`") from None
        except (ValueError, RecursionError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrailmedError(f"{path}: not a trailmed edit, or damaged ({reason}); make it with `trailmed edit`") from None
        except OSError as error:
            raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error

    def scaled(self, scale: float) -> Edit:
        """The edit at strength `scale`: B becomes scale·B, a row scale r becomes 1 + scale·(r − 1); 0 is the base, 1 this edit."""
        if not math.isfinite(scale):
            raise ValueError(f"cannot scale an edit by {scale}")
        factors = {
            name: Factor(
                np.float32(scale) * factor.b, factor.a,
                None if factor.row_scale is None else np.float32(1) + np.float32(scale) * (factor.row_scale - np.float32(1)),
            )
            for name, factor in self.factors.items()
        }
        before = self.recipe.get("scale")
        total = scale * before if isinstance(before, int | float) else scale
        return replace(self, factors=factors, recipe={**self.recipe, "scale": total})

    def concatenated(self, other: Edit) -> Edit:
        """This edit, then `other`: diag(r₂)(diag(r₁)(W + B₁A₁) + B₂A₂), again a low-rank edit (ranks add up).

        Raises `TrailmedError` when the two are for different models, ValueError when a row that this edit scales to 0 is edited again.
        """
        if self.fingerprint != other.fingerprint:
            raise TrailmedError("the two edits were made for different models; they cannot be joined")
        factors = {**other.factors, **self.factors}
        for name in self.factors.keys() & other.factors.keys():
            factors[name] = _then(self.factors[name], other.factors[name])
        removed = tuple(sorted({*self.removed, *other.removed}))
        return Edit(
            factors=factors, fingerprint=self.fingerprint, base_sha256=self.base_sha256,
            recipe={"method": "concatenated", "parts": [dict(self.recipe), dict(other.recipe)]},
            removed=removed, kept=tuple(sorted({*self.kept, *other.kept} - set(removed))), seed=self.seed,
        )

    def _header(self) -> dict[str, Any]:
        return {
            "format": _FORMAT, "fingerprint": self.fingerprint, "base_sha256": self.base_sha256, "recipe": dict(self.recipe),
            "removed": self.removed, "kept": self.kept, "seed": self.seed,
        }

    def _to_bytes(self) -> bytes:
        tensors = {
            f"{name}.{part}": array
            for name, factor in self.factors.items() for part in _PARTS if (array := getattr(factor, part)) is not None
        }
        # A single metadata entry, because safetensors writes several in random order.
        header = json.dumps(self._header(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return safetensors.numpy.save(tensors, metadata={_HEADER_KEY: header})


class _Header(BaseModel):
    """The JSON header of a saved edit."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = Field(ge=_FORMAT, le=_FORMAT)
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    base_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    recipe: dict[str, Any]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    seed: int = Field(ge=0, lt=1 << 64)


def _then(first: Factor, second: Factor) -> Factor:
    b, row_scale = second.b, second.row_scale
    if first.row_scale is not None:
        if not first.row_scale.all():
            raise ValueError("a row scaled to 0 cannot be edited again")
        b = b / first.row_scale[:, None]
        row_scale = first.row_scale if row_scale is None else first.row_scale * row_scale
    return Factor(np.concatenate([first.b, b], axis=1), np.concatenate([first.a, second.a], axis=0), row_scale)


def _read(path: Path) -> dict[str, Any]:
    """The arguments of the `Edit` in `path`. Raises what `Edit.load` turns into `TrailmedError`."""
    # safetensors allocates its header before it looks at the file's size, so that is compared here first.
    with path.open("rb") as source:
        prefix = source.read(8)
    if len(prefix) < 8 or struct.unpack("<Q", prefix)[0] > path.stat().st_size - 8:
        raise ValueError("truncated")
    with safetensors.safe_open(path, framework="np") as opened:
        text = (opened.metadata() or {}).get(_HEADER_KEY)
        if text is None:
            raise ValueError("it has no edit header")
        if len(text) > _MAX_HEADER_CHARACTERS:
            raise ValueError(f"its header has {len(text)} characters")
        header = _Header.model_validate_json(json.dumps(json.loads(text), allow_nan=False))
        names = list(opened.keys())
        if len(names) > _MAX_TENSORS:
            raise ValueError(f"it holds {len(names)} tensors")
        parts: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for name in names:
            tensor, _, part = name.rpartition(".")
            if part not in _PARTS or not tensor:
                raise ValueError(f"unknown tensor {name!r}")
            kind = opened.get_slice(name).get_dtype()
            if kind != "F32":
                raise ValueError(f"{name!r} is {kind}, not F32")
            parts.setdefault(tensor, {})[part] = opened.get_tensor(name)
    for tensor, arrays in parts.items():
        if "a" not in arrays or "b" not in arrays:
            raise ValueError(f"{tensor!r} lacks one of its two factors")
    values = header.model_dump(exclude={"format"})
    return {**values, "factors": {tensor: Factor(**arrays) for tensor, arrays in parts.items()}}
