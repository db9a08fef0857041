"""A fresh store for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.store import Store
from tests.registry.examples import new_store
from tests.shared import paths_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store in `tmp_path`."""
    with new_store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def twin(store: Store) -> Iterator[Store]:
    """The same store as another process has it open."""
    with new_store(paths_of(store).root) as opened:
        yield opened
