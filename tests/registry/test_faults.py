"""Crashes and failing calls: the store is as before or as after, and the same command again reaches the goal.

SIGKILL says nothing of power loss, since the page cache survives it; blobs/test_local.py tests the order of syncs.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from registry import files as fs
from registry.errors import RegistryError
from registry.storage.blobs.content import Blobs, digest_of
from registry.storage.paths import StorePaths
from registry.store import Store
from tests.registry.children import KILLED, run, start, wait
from tests.registry.examples import ingest, new_store
from tests.registry.writing import COMMANDS, contents, place_at, problems

pytestmark = pytest.mark.kept_in("folder", reason="a fork of a process that has used an object store uses none")

FAILPOINTS = {
    "ingest_all": ["store-before-format", "blob-staged", "blob-renamed", "blobs-durable",
                   "rows-before-commit", "rows-committed"],
    "learn": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed", "blob-unlinked"],
    "extend": ["rows-before-commit", "rows-committed", "manifests-deleted"],
    "remove_and_prune": ["rows-committed", "manifests-deleted", "blob-unlinked"],
    "evict_and_prune": ["rows-before-commit", "rows-committed", "manifests-deleted", "blob-unlinked"],
    "next_version": ["blobs-durable", "rows-before-commit", "rows-committed"],
}  # fmt: skip
_ONLY_IN_FOLDERS = {("ingest_all", "store-before-format"), ("learn", "blob-unlinked")}
_OF_FOLDERS = pytest.mark.kept_in("sqlite", reason="a store folder has FORMAT, and deletes young bytes")
POINTS = [
    pytest.param(name, point, marks=_OF_FOLDERS if (name, point) in _ONLY_IN_FOLDERS else ())
    for name, points in FAILPOINTS.items()
    for point in points
]


@pytest.mark.one_case
@pytest.mark.parametrize(("name", "failpoint"), POINTS)
def test_a_kill_at_each_point_loses_nothing(tmp_path: Path, name: str, failpoint: str) -> None:
    root, undisturbed = tmp_path / "store", tmp_path / "undisturbed" / "store"
    undisturbed.parent.mkdir()
    COMMANDS[name](place_at(undisturbed))
    assert run(lambda: COMMANDS[name](place_at(root)), failpoint=failpoint) == KILLED
    assert problems(place_at(root)) == []
    COMMANDS[name](place_at(root))
    assert problems(place_at(root)) == []
    assert contents(place_at(root)) == contents(place_at(undisturbed))


@pytest.mark.one_case
@pytest.mark.parametrize("failpoint", sorted({point for points in FAILPOINTS.values() for point in points}))
def test_what_a_kill_leaves_is_removed_by_prune(tmp_path: Path, failpoint: str) -> None:
    root = tmp_path / "store"
    for command in COMMANDS.values():
        run(lambda command=command: command(place_at(root)), failpoint=failpoint)  # type: ignore[misc]
    with new_store(root) as store:
        store.prune(grace=0)
        # A state that was not committed stays until the next change of its name: it may be all that is left of one
        # that was, if the database is an old copy.
        assert {finding.kind for finding in store.verify(read_data=True)} <= {"uncommitted"}


def test_the_check_would_catch_a_ref_that_moves_before_its_bytes_are_there(tmp_path: Path) -> None:
    def refs_first() -> None:
        with new_store(tmp_path / "store") as store, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Blobs, "put_all", lambda self, items: [digest_of(data) for data in items])
            ingest(store, "rust", weights=b"weights")

    assert run(refs_first, failpoint="rows-committed") == KILLED
    assert problems(place_at(tmp_path / "store"))


class FailingCalls:
    """Lets the n-th call of the seam fail, and all later ones too if it is not transient."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, *, code: int, transient: bool) -> None:
        self.count = 0
        for name in ("create", "write", "fsync", "replace", "unlink", "make_dir"):
            patch.setattr(fs, name, self.wrap(getattr(fs, name), number, code, transient))

    def wrap(self, real: Callable[..., object], number: int, code: int, transient: bool) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.count += 1
            if self.count == number or (self.count > number and not transient):
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call


@pytest.mark.fault
@pytest.mark.parametrize(
    ("code", "transient", "stride"),
    [(errno.EIO, True, 1), (errno.ENOSPC, False, 3), (errno.EACCES, False, 7)],
    ids=["EIO once", "ENOSPC from then on", "EACCES from then on"],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_each_failing_call_is_an_error_that_leaves_a_sound_store(
    tmp_path: Path, name: str, code: int, transient: bool, stride: int
) -> None:
    number, reached = 1 - stride, True
    while reached:
        number += stride
        root = tmp_path / str(number) / "store"
        root.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            calls = FailingCalls(patch, number, code=code, transient=transient)
            with suppress(RegistryError):
                COMMANDS[name](place_at(root))
            reached = calls.count >= number
        COMMANDS[name](place_at(root))
        assert problems(place_at(root)) == []
    assert number > 10


def acknowledge_ingests(root: Path, log: Path) -> None:
    """Ingest task after task, writing the name of each to `log` once the store has said that it is done."""
    with new_store(root) as store, log.open("a", buffering=1) as acknowledged:
        known = store.names()
        for number in range(len(known), 10_000):
            ingest(store, f"task{number}", steps=[1, 2])
            acknowledged.write(f"task{number}\n")


@pytest.mark.fault
def test_a_kill_at_a_random_time_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    draw = random.Random(20)
    for _ in range(40):
        pid = start(lambda: acknowledge_ingests(root, log))
        time.sleep(draw.uniform(0.0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == KILLED
        assert problems(place_at(root)) == []
    with new_store(root) as store:
        assert set(store.names()) >= set(log.read_text().split())
        store.prune(grace=0)
        assert {finding.kind for finding in store.verify(read_data=True)} <= {"uncommitted"}


@pytest.mark.kept_in("sqlite", reason="the journal of SQLite")
def test_a_reader_rolls_back_what_a_killed_writer_left(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with new_store(root) as store:
        ingest(store, "rust")

    def die_with_a_hot_journal() -> None:
        with new_store(root) as store, store._db._writing() as connection:
            connection.exec_driver_sql("PRAGMA cache_size=1")
            connection.exec_driver_sql("CREATE TABLE t (x)")
            connection.exec_driver_sql("UPDATE refs SET name = 'lost'")
            connection.exec_driver_sql("INSERT INTO t VALUES (zeroblob(1000000))")
            os.kill(os.getpid(), signal.SIGKILL)

    assert run(die_with_a_hot_journal) == KILLED
    assert StorePaths(root).database.with_name("registry.db-journal").stat().st_size > 0
    with Store.open(root, read_only=True) as store:
        assert store.names() == ["rust"]
