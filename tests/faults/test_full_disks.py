"""A file system that is really full: a command ends with an error, loses nothing, and gets on once there is space."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from registry.errors import RegistryError, StoreFull, StoreUnavailable
from tests.conftest import folder_of_a_server
from tests.faults.pairs import PAIRS, PLAIN, Pair, Servers
from tests.pg_server import pg_server
from tests.registry.writing import COMMANDS, FACTS, Place, contents, problems

LARGEST = 4096  # KB; enough for every command
LARGEST_OF_SERVER = 200 << 10  # a new server has 40 MB, a new database 7 MB


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Path]:
    """Make a folder a file system of its own, of some KB."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "icm", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    with mounted(tmp_path / "disk", LARGEST) as folder:
        yield folder


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Path]]:
    """A database server, and the file system that has all its files."""
    with (
        folder_of_a_server() as folder,
        mounted(folder / "disk", LARGEST_OF_SERVER) as disk,
        pg_server(disk, is_durable=True) as address,
    ):
        yield address, disk


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize // 1024


@contextmanager
def full(disk: Path, spare: int = 0) -> Iterator[None]:
    """Leave the file system of a server some KB for a while."""
    resize(disk, used(disk) + spare)
    try:
        yield
    finally:
        resize(disk, LARGEST_OF_SERVER)


def lost(pair: Pair, told: list[str]) -> list[str]:
    """Return what the store has acknowledged and does not have."""
    with pair.open() as store:
        return [fact for fact in told if not FACTS[fact](store) and f"no {fact}" not in told]


@pytest.fixture(params=[name for name in PAIRS if name != "postgres+s3"])
def pair_on(request: pytest.FixtureRequest) -> Callable[[Path], Pair]:
    """What makes a pair whose part on this machine is in a folder."""
    running = Servers() if request.param == PLAIN else request.getfixturevalue("running")
    return lambda folder: Pair(request.param, folder, running)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evict_and_prune", *(pytest.param(n, marks=pytest.mark.fault) for n in COMMANDS)])
def test_a_full_disk_loses_nothing(pair_on: Callable[[Path], Pair], disk: Path, tmp_path: Path, name: str) -> None:
    pair = pair_on(disk)
    pair.clear()
    pair.make()
    place = Place(pair.open, tmp_path)
    COMMANDS[name](place)
    end, needed = contents(place), used(disk)
    refused = 0
    for size in range(needed // 4, needed + 64, max(16, needed // 16)):
        told: list[str] = []
        resize(disk, LARGEST)
        pair.clear()
        pair.make()
        if size <= used(disk):
            continue
        resize(disk, size)
        try:
            COMMANDS[name](Place(pair.open, tmp_path, told.append))
        except RegistryError:
            refused += 1
        assert lost(pair, told) == []
        assert problems(place) == []
        resize(disk, LARGEST)
        COMMANDS[name](place)
        assert problems(place) == []
        assert contents(place) == end
    assert refused or pair.blobs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step"), [("evict_and_prune", 256), *(pytest.param(n, 64, marks=pytest.mark.fault) for n in COMMANDS)]
)
def test_a_full_disk_of_the_database_server_loses_nothing(
    server: tuple[str, Path], tmp_path: Path, name: str, step: int
) -> None:
    address, disk = server
    pair = Pair("postgres+folder", tmp_path, Servers(postgres=address))
    place = Place(pair.open, tmp_path)
    errors, ends = list[RegistryError](), []
    for spare in range(0, 513, step):  # KB; for the last of them there is enough
        pair.clear()
        pair.make()
        told: list[str] = []
        with full(disk, spare):
            try:
                COMMANDS[name](Place(pair.open, tmp_path, told.append))
            except RegistryError as error:
                errors.append(error)
            with suppress(
                StoreUnavailable
            ):  # a full server writes a file for a new connection now and then, or refuses it
                assert lost(pair, told) == []
                assert problems(place) == []
        COMMANDS[name](place)
        assert lost(pair, told) == []
        assert problems(place) == []
        ends.append(contents(place))
    said = {type(error): str(error.hint) for error in errors}
    assert "free disk space" in said[StoreFull]
    assert said.keys() <= {StoreFull, StoreUnavailable}
    assert ends[1:] == ends[:-1]


@pytest.mark.fault
def test_a_server_that_stops_for_want_of_space_loses_nothing(server: tuple[str, Path], tmp_path: Path) -> None:
    import psycopg

    address, disk = server
    pair = Pair("postgres+folder", tmp_path, Servers(postgres=address))
    pair.make()
    place, told = Place(pair.open, tmp_path), list[str]()
    COMMANDS["learn"](Place(pair.open, tmp_path, told.append))
    # It needs another file for its log then, without which it does not go on.
    rows = f"generate_series(1, {LARGEST_OF_SERVER})"
    much = f"SELECT pg_logical_emit_message(false, 'icm', repeat('x', 1024)) FROM {rows}"
    with full(disk):
        with psycopg.connect(address) as connection, pytest.raises(psycopg.OperationalError):
            connection.execute(much.encode())
        with pytest.raises((StoreFull, StoreUnavailable)):
            COMMANDS["extend"](Place(pair.open, tmp_path, told.append))
    for _ in range(300):
        with suppress(StoreUnavailable):
            pair.open().close()
            break
        time.sleep(0.1)
    COMMANDS["extend"](place)
    assert lost(pair, told) == []
    assert problems(place) == []
