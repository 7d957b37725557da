"""Values that are kept as JSON files: written with the same bytes every time, and checked in full when read back.

A stored value is a dataclass with the two fields `format` (what the file is) and `schema_version`; its types are its schema.
Files may come from strangers: their size is bounded before they are read, unknown fields and values of another type are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import pydantic_core
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import TrailmedError
from ..files import write_json_atomically

MAX_DOCUMENT_BYTES = 256 << 20
STORED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""The `__pydantic_config__` of every dataclass that is part of a document."""

T = TypeVar("T")


def save_document(path: Path, value: T, schema: TypeAdapter[T]) -> None:
    """Write `value` to `path` as key-sorted JSON, whole or not at all. Raises `TrailmedError` when that fails."""
    write_json_atomically(path, schema.dump_python(value, mode="json"))


def load_document(path: Path, schema: TypeAdapter[T], *, format: str, schema_version: int) -> T:
    """Read what `save_document` wrote.

    Raises `TrailmedError` when the file is missing, too large, not JSON, another kind of file, of another schema version, or holds
    a value that does not fit the schema (naming the first field that does not).
    """
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise TrailmedError(f"{path}: {size} bytes, more than a {format} file may have ({MAX_DOCUMENT_BYTES}); make it anew")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise TrailmedError(f"{path}: no such file") from error
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        header = pydantic_core.from_json(raw)
    except ValueError as error:
        raise TrailmedError(f"{path}: not valid JSON ({error}); make it anew") from error
    if not isinstance(header, dict) or header.get("format") != format:
        raise TrailmedError(f"{path}: is not a {format} file; give the file that trailmed wrote")
    found = header.get("schema_version")
    if type(found) is not int or found != schema_version:
        raise TrailmedError(f"{path}: another version of trailmed wrote this {format} file (this one reads {schema_version}); make it anew")
    try:
        return schema.validate_json(raw)
    except ValidationError as error:
        raise TrailmedError(f"{path}: {first_fault(error)}; make it anew") from error


def first_fault(error: ValidationError) -> str:
    """Where the first fault is and what: "answers.0.id: String should …", one short line whatever the stranger's file holds."""
    first = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return f"{_one_line(field, 80)}: {_one_line(first['msg'], 200)}"


def _one_line(text: str, longest: int) -> str:
    return re.sub(r"[^\x20-\x7e]+", " ", text)[:longest]
