"""A file system that is really full: a command ends with an error, loses nothing, and gets on once there is space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.errors import RegistryError
from tests.faults.pairs import PAIRS, PLAIN, Pair, Servers
from tests.registry.writing import COMMANDS, FACTS, Place, contents, problems

LARGEST = 4096  # KB; enough for every command


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGEST}k", "icm", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize // 1024


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
        with pair.open() as store:
            assert [fact for fact in told if not FACTS[fact](store) and f"no {fact}" not in told] == []
        assert problems(place) == []
        resize(disk, LARGEST)
        COMMANDS[name](place)
        assert problems(place) == []
        assert contents(place) == end
    assert refused or pair.blobs
