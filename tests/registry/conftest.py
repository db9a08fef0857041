"""A fresh store for each test, of the pair that the run is for: see `tests.registry.pairs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.store import Store
from tests.registry.examples import new_store
from tests.registry.pairs import DEFAULT, PAIRS, pair
from tests.s3_server import S3Server


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the pair of a run."""
    parser.addoption("--pair", choices=PAIRS, default=DEFAULT, help="storage of rows and bytes")


def pytest_configure(config: pytest.Config) -> None:
    """Set the pair. The option is unknown in a run that did not start in this folder."""
    pair.name = config.getoption("--pair", DEFAULT)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of features that this pair lacks, for the reason in their marks."""
    needs = {item: {part for mark in item.iter_markers("kept_in") for part in mark.args} for item in items}
    left = [item for item, parts in needs.items() if not parts <= set(pair.parts)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session", autouse=True)
def servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start the servers that the pair needs."""
    if "postgres" in pair.parts:
        pair.server = request.getfixturevalue("postgres")
    with pytest.MonkeyPatch.context() as patch:
        if "s3" in pair.parts:
            server: S3Server = request.getfixturevalue("s3")
            for name, value in server.environment.items():
                patch.setenv(name, value)
        yield


@pytest.fixture(autouse=True)
def no_other_stores(servers: None) -> Iterator[None]:
    """Remove the databases of a test."""
    with pair.cleared():
        yield


@pytest.fixture
def store(tmp_path: Path, no_other_stores: None) -> Iterator[Store]:
    """A new store."""
    with new_store(tmp_path / "store") as opened:
        yield opened


@pytest.fixture
def twin(store: Store) -> Iterator[Store]:
    """The same store as another process has it open."""
    with new_store(store.address) as opened:
        yield opened
