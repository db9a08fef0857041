"""One zygote and one set of templates for all tests of faults."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.faults.world import World
from tests.faults.zygote import Zygote


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A small fleet with the starting state of every command."""
    with closing(Zygote()) as zygote:
        yield World(tmp_path_factory.mktemp("faults"), zygote)
