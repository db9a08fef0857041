"""One zygote, and for each pair one set of templates, for all tests of faults."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache

import pytest

from tests.conftest import folder_of_a_server
from tests.faults.pairs import PAIRS, PLAIN, Pair, Servers, servers
from tests.faults.world import World
from tests.faults.zygote import Zygote
from tests.s3_server import CannotStart


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that runs commands."""
    with closing(Zygote()) as found:
        yield found


@pytest.fixture(scope="session")
def running() -> Iterator[Servers]:
    """A database server and an object store; what needs them says why it was skipped where there are none."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'icm-lora[team]'")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'icm-lora[team]'")
    try:
        with folder_of_a_server() as folder, servers(folder) as found:
            yield found
    except CannotStart as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, request: pytest.FixtureRequest
) -> Callable[[str], World]:
    """Return the small fleet on a pair, with the starting state of every command."""

    @cache
    def world_on(name: str) -> World:
        root = tmp_path_factory.mktemp("faults")
        return World(root, zygote, Pair(name, root, Servers() if name == PLAIN else request.getfixturevalue("running")))

    return world_on


@pytest.fixture
def world(worlds: Callable[[str], World]) -> World:
    """A small fleet with the starting state of every command, in a folder."""
    return worlds(PLAIN)


# Two of the pairs have each database and each place: the other two are for `make faults`.
PARAMS = [pytest.param(pair, marks=[] if pair in (PAIRS[0], PAIRS[-1]) else pytest.mark.fault) for pair in PAIRS]


@pytest.fixture(params=PARAMS)
def each(worlds: Callable[[str], World], request: pytest.FixtureRequest) -> World:
    """The same on each pair."""
    return worlds(request.param)
