"""The store lock between open files, as between processes, and the job lock between processes."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.errors import StoreLocked, StoreReadOnly
from registry.storage.locks import Deadline
from registry.storage.locks.flocks import FileLock
from registry.store import Store
from tests.registry.children import start, wait
from tests.registry.examples import BASE, ingest
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", reason="the locks of a store folder")


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[tuple[FileLock, FileLock]]:
    """Two locks on one file that do not wait."""
    pair = tuple(FileLock(tmp_path / "lock", deadline=Deadline(0), command=f"icm {name}") for name in ("one", "two"))
    yield (pair[0], pair[1])
    for lock in pair:
        lock.close()


def test_the_message_names_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    parent = os.getppid()
    lock = FileLock(path, deadline=Deadline(0), command="icm prune")
    other = FileLock(path, deadline=Deadline(0), command="icm ls")
    other.share()
    path.write_text(f"{parent} icm train\n999999999 icm long gone\nnot a line of ours\n")
    with pytest.raises(StoreLocked) as caught, lock.exclusive():
        pytest.fail("it was held")
    assert f"process {parent}: icm train" in str(caught.value)
    assert "long gone" not in str(caught.value)
    assert "--lock-timeout" in (caught.value.hint or "")
    lock.close()
    other.close()


def test_the_names_in_the_file_cannot_grow_without_bound(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", deadline=Deadline(0), command="x" * 1000)
    for _ in range(100):
        lock.share()
    assert (tmp_path / "lock").stat().st_size < 8192
    lock.close()


def test_a_command_with_line_breaks_stays_one_line(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock", deadline=Deadline(0), command="icm\n1 evil")
    lock.share()
    assert len((tmp_path / "lock").read_text().splitlines()) == 1
    lock.close()


class TestJobs:
    """One long job at a time for a base model, among processes."""

    def test_a_second_job_times_out_and_names_the_first(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm train --steps 300") as pid, open_store(tmp_path, timeout=0.2) as store:
            with pytest.raises(StoreLocked) as caught, store.job(BASE):
                pytest.fail("two jobs ran")
            assert f"base model '{BASE}' is in use by process {pid}: icm train --steps 300" in str(caught.value)
            assert "--lock-timeout" in (caught.value.hint or "")

    @pytest.mark.slow
    def test_a_second_job_waits_for_the_first(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm encode", seconds=0.4), open_store(tmp_path, timeout=30) as store:
            began = time.monotonic()
            with store.job(BASE):
                assert time.monotonic() - began > 0.1

    def test_a_job_of_another_base_model_does_not_wait(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm train"), open_store(tmp_path, timeout=0) as store, store.job("other/base"):
            pass

    def test_jobs_that_share_do_not_wait_for_each_other(self, tmp_path: Path) -> None:
        with (
            job_elsewhere(tmp_path, "icm encode", shared=True),
            open_store(tmp_path, timeout=0) as store,
            store.job(BASE, shared=True),
        ):
            pass

    @pytest.mark.parametrize("theirs", [True, False])
    def test_a_job_that_shares_and_one_that_does_not_wait_for_each_other(self, tmp_path: Path, theirs: bool) -> None:
        with (
            job_elsewhere(tmp_path, "icm encode", shared=theirs),
            open_store(tmp_path, timeout=0) as store,
            pytest.raises(StoreLocked),
            store.job(BASE, shared=not theirs),
        ):
            pytest.fail("both ran")

    def test_reading_and_ingesting_do_not_wait_for_a_job(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm train"), open_store(tmp_path, timeout=0) as store:
            ingest(store, "rust")
            assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"

    def test_a_killed_job_leaves_no_lock(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm train") as pid, open_store(tmp_path, timeout=5) as store:
            os.kill(pid, signal.SIGKILL)
            with store.job(BASE):
                pass

    def test_a_job_that_fails_leaves_no_lock(self, tmp_path: Path) -> None:
        def fail(store: Store) -> None:
            with store.job(BASE):
                raise LookupError

        with open_store(tmp_path, timeout=0) as store, open_store(tmp_path, timeout=0) as other:
            with pytest.raises(LookupError):
                fail(store)
            with other.job(BASE):
                pass

    def test_a_store_that_is_opened_read_only_has_no_jobs(self, tmp_path: Path) -> None:
        open_store(tmp_path, timeout=0).close()
        with Store.open(tmp_path / "store", read_only=True) as store, pytest.raises(StoreReadOnly), store.job(BASE):
            pytest.fail("it ran")


def open_store(folder: Path, *, timeout: float, command: str = "test") -> Store:
    return Store.open(folder / "store", create=True, lock_timeout=timeout, command=command)


@contextmanager
def job_elsewhere(folder: Path, command: str, *, seconds: float = 60.0, shared: bool = False) -> Iterator[int]:
    """Run a job in another process, which is killed after the block, and yield the pid."""

    def work() -> None:
        with open_store(folder, timeout=5, command=command) as store, store.job(BASE, shared=shared):
            (folder / "began").touch()
            time.sleep(seconds)

    pid = start(work)
    try:
        while not (folder / "began").exists():
            time.sleep(0.01)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)


class TestPatience:
    """One deadline for all waits, and words for each of them."""

    def test_waits_do_not_add_up(self, locks: tuple[FileLock, FileLock], tmp_path: Path) -> None:
        deadline = Deadline(0.3)
        locks[0].share()
        lock = FileLock(tmp_path / "lock", deadline=deadline, command="icm rm")
        for _ in range(3):
            with pytest.raises(StoreLocked), lock.exclusive():
                pytest.fail("it was held")
        assert (deadline.left, deadline.seconds) == (0, 0.3)
        lock.close()

    def test_a_wait_says_what_for_and_who_holds_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("registry.storage.locks.NOTIFY_EVERY", 0)
        told: list[str] = []
        with job_elsewhere(tmp_path, "icm train --steps 300") as pid:
            deadline = Deadline(0.3, told.append)
            with Store.open(tmp_path / "store", deadline=deadline) as store, pytest.raises(StoreLocked):
                store.job(BASE).__enter__()
        assert set(told) == {f"waiting for base model {BASE!r}, held by process {pid}: icm train --steps 300"}

    def test_what_is_told_may_end_the_wait_and_the_store_is_still_held(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("registry.storage.locks.NOTIFY_EVERY", 0)

        def stop(text: str) -> None:
            raise KeyboardInterrupt

        with (
            job_elsewhere(tmp_path, "icm train") as pid,
            Store.open(tmp_path / "store", deadline=Deadline(60, stop)) as store,
        ):
            with pytest.raises(KeyboardInterrupt):
                store.job(BASE).__enter__()
            os.kill(pid, signal.SIGKILL)
            with open_store(tmp_path, timeout=0.2) as other, pytest.raises(StoreLocked):
                other.prune()

    def test_only_those_who_hold_a_lock_are_named(self, tmp_path: Path) -> None:
        with job_elsewhere(tmp_path, "icm train") as pid, open_store(tmp_path, timeout=0) as store:
            path = paths_of(store).job(BASE)
            path.write_text(f"{os.getppid()} icm encode\n{path.read_text()}")  # which was done with it long ago
            with pytest.raises(StoreLocked) as caught:
                store.job(BASE).__enter__()
            assert str(caught.value).endswith(f"is in use by process {pid}: icm train")

    def test_one_who_has_just_begun_to_wait_goes_before_those_who_come_to_read(
        self, locks: tuple[FileLock, FileLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        locks[0].share()
        gate = os.open(tmp_path / "lock.gate", os.O_RDWR | os.O_CREAT)
        fcntl.flock(gate, fcntl.LOCK_EX)
        deadline = Deadline(0.2)
        lock = FileLock(tmp_path / "lock", deadline=deadline, command="icm ls")
        lock.enter()
        assert deadline.left == 0  # it waited, and then it read
        os.utime(gate, (0, 0))
        late = Deadline(5)
        FileLock(tmp_path / "lock", deadline=late, command="icm ls").enter()
        assert late.left == 5
        os.close(gate)
        lock.close()
