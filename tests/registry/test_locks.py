"""Shared and exclusive locks between open files, as between processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import StoreLocked
from registry.locks import FileLock


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[tuple[FileLock, FileLock]]:
    """Two locks on one file that do not wait."""
    pair = tuple(FileLock(tmp_path / "lock", timeout=0, command=f"icm {name}") for name in ("one", "two"))
    yield (pair[0], pair[1])
    for lock in pair:
        lock.close()


def test_many_share(locks: tuple[FileLock, FileLock]) -> None:
    locks[0].share()
    locks[1].share()


def test_nobody_else_gets_in_while_one_is_exclusive(locks: tuple[FileLock, FileLock]) -> None:
    with locks[0].exclusive(), pytest.raises(StoreLocked):
        locks[1].share()


def test_exclusive_waits_for_those_that_share_and_gives_up(locks: tuple[FileLock, FileLock]) -> None:
    locks[0].share()
    locks[1].share()
    with pytest.raises(StoreLocked), locks[1].exclusive():
        pytest.fail("two held it")


def test_after_exclusive_the_lock_is_shared_again(locks: tuple[FileLock, FileLock]) -> None:
    with locks[0].exclusive():
        pass
    locks[1].share()
    with pytest.raises(StoreLocked), locks[1].exclusive():
        pytest.fail("the first one's shared lock was lost")


def test_closing_lets_go(locks: tuple[FileLock, FileLock]) -> None:
    locks[0].share()
    locks[0].close()
    with locks[1].exclusive():
        pass


def test_the_message_names_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    parent = os.getppid()
    lock = FileLock(path, timeout=0, command="icm prune")
    other = FileLock(path, timeout=0, command="icm ls")
    other.share()
    path.write_text(f"{parent} icm train\n999999999 icm long gone\nnot a line of ours\n")
    with pytest.raises(StoreLocked) as caught, lock.exclusive():
        pytest.fail("it was held")
    assert f"pid {parent}, icm train" in str(caught.value)
    assert "long gone" not in str(caught.value)
    assert "--lock-timeout" in (caught.value.hint or "")
    lock.close()
    other.close()


def test_the_names_in_the_file_cannot_grow_without_bound(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", timeout=0, command="x" * 1000)
    for _ in range(100):
        lock.share()
    assert (tmp_path / "lock").stat().st_size < 8192
    lock.close()


def test_a_command_with_line_breaks_stays_one_line(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", timeout=0, command="icm\n1 evil")
    lock.share()
    assert len((tmp_path / "lock").read_text().splitlines()) == 1
    lock.close()
