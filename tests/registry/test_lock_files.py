"""The lock files and their contents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from registry.errors import StoreLocked
from registry.storage.locks import Deadline
from registry.storage.locks.flocks import FileLock
from registry.store import Store
from tests.registry.examples import new_store
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", reason="the lock files of a store folder")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/absolute", "", "a/b", "nul\0", "x" * 5000, "é", "\x1b[31m"])
def test_the_job_of_a_base_model_of_any_name_has_its_lock_in_the_store(store: Store, name: str) -> None:
    with store.job(name):
        path = paths_of(store).job(name)
        assert path.parent == paths_of(store).root / "jobs"
        assert path.is_file()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    new_store(root).close()
    (root / "lock").unlink()
    (root / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(Exception, match="lock"):
        new_store(root)
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe garbage", b"12", b"not-a-pid icm train\n", b"9" * 300 + b" icm\n"])
def test_garbage_in_a_lock_file_only_costs_the_names(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    first = FileLock(path, deadline=Deadline(0), command="first")
    first.hold()
    second = FileLock(path, deadline=Deadline(0), command="second")
    with pytest.raises(StoreLocked, match="is in use"):
        second.share()
    for lock in (first, second):
        lock.close()


def test_the_message_says_how_long_was_waited_and_what_it_was_for(tmp_path: Path) -> None:
    holder = FileLock(tmp_path / "lock", deadline=Deadline(0), command="icm train", subject="base model 'x'")
    holder.hold()
    waiter = FileLock(tmp_path / "lock", deadline=Deadline(0.25), command="icm evict", subject="base model 'x'")
    with pytest.raises(StoreLocked) as caught:
        waiter.hold()
    assert caught.value.message == "base model 'x' is in use"  # by this very process, which is not named
    assert caught.value.hint is not None
    assert "0.25 s" in caught.value.hint
    for lock in (holder, waiter):
        lock.close()


def test_a_lock_on_read_only_media_writes_no_name(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    lock = FileLock(path, deadline=Deadline(0), command="icm ls", writable=False)
    lock.share()
    assert path.read_bytes() == b""
    lock.close()
    lock = FileLock(path, deadline=Deadline(0), command="icm ls")
    lock.share()
    assert path.read_text() == f"{os.getpid()} icm ls\n"
    lock.close()
