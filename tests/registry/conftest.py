"""A fresh store for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.store import Store
from tests.registry.examples import new_store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in `tmp_path`."""
    with new_store(tmp_path / "store") as opened:
        yield opened
