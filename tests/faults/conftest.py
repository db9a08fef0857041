"""One zygote, and for each pair one set of templates, for all tests of faults."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.faults.pairs import PAIRS, Pair, Servers, servers
from tests.faults.world import World
from tests.faults.zygote import Zygote
from tests.s3_server import CannotStart


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that runs commands."""
    with closing(Zygote()) as found:
        yield found


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A database server and an object store; what needs them says why it was skipped where there are none."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'icm-lora[team]'")
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'icm-lora[team]'")
    try:
        with servers(tmp_path_factory.mktemp("servers")) as found:
            yield found
    except CannotStart as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> World:
    """A small fleet with the starting state of every command, in a folder."""
    root = tmp_path_factory.mktemp("faults")
    return World(root, zygote, Pair(PAIRS[0], root, Servers()))


@pytest.fixture(scope="session", params=PAIRS[1:])
def far(
    tmp_path_factory: pytest.TempPathFactory, zygote: Zygote, running: Servers, request: pytest.FixtureRequest
) -> World:
    """The same for each other pair."""
    root = tmp_path_factory.mktemp("faults")
    return World(root, zygote, Pair(request.param, root, running))
