"""Several holders of one lock: whatever they do in turn, nobody shares what another one has alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from registry.errors import StoreLocked
from registry.storage.locks import FileLock, Patience
from registry.store import Store
from tests.registry.examples import new_store

HOLDERS = st.integers(0, 2)


class LockModel(RuleBasedStateMachine):
    """Three open lock files, as three processes have them, and what each of them holds."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.locks: list[FileLock] = []
        self.held: list[str | None] = [None, None, None]

    @initialize()
    def open_all(self) -> None:
        self.locks = [self.opened() for _ in self.held]

    def opened(self) -> FileLock:
        return FileLock(self.folder / "lock", patience=Patience(0), command="test")

    def teardown(self) -> None:
        for lock in self.locks:
            lock.close()
        shutil.rmtree(self.folder)

    def others(self, who: int) -> set[str | None]:
        return {held for number, held in enumerate(self.held) if number != who}

    @rule(who=HOLDERS)
    def share(self, who: int) -> None:
        if "alone" in self.others(who):
            with pytest.raises(StoreLocked):
                self.locks[who].share()
            return
        self.locks[who].share()
        self.held[who] = "shared"

    @rule(who=HOLDERS)
    def let_go(self, who: int) -> None:
        self.locks[who].close()
        self.locks[who].close()  # twice is once
        self.locks[who], self.held[who] = self.opened(), None

    @rule(who=HOLDERS)
    def hold(self, who: int) -> None:
        if self.held[who] is not None:  # only jobs hold, and they begin with nothing
            return
        if self.others(who) != {None}:
            with pytest.raises(StoreLocked):
                self.locks[who].hold()
            return
        self.locks[who].hold()
        self.held[who] = "alone"

    @rule(who=HOLDERS)
    def be_alone_for_a_block(self, who: int) -> None:
        if self.held[who] != "shared":
            return
        if self.others(who) == {None}:
            with self.locks[who].exclusive():
                self.nobody_else_gets_in()
            return
        with pytest.raises(StoreLocked), self.locks[who].exclusive():
            pytest.fail("another one uses the store")

    @rule(who=HOLDERS)
    def try_to_be_alone_for_a_block(self, who: int) -> None:
        if self.held[who] != "shared":
            return
        with self.locks[who].try_exclusive() as is_alone:
            assert is_alone == (self.others(who) == {None})
            if is_alone:
                self.nobody_else_gets_in()

    def nobody_else_gets_in(self) -> None:
        newcomer = self.opened()
        with pytest.raises(StoreLocked):
            newcomer.share()
        newcomer.close()

    @invariant()
    def a_newcomer_may_share_unless_somebody_is_alone(self) -> None:
        newcomer = self.opened()
        if "alone" in self.held:
            with pytest.raises(StoreLocked):
                newcomer.share()
        else:
            newcomer.share()
        newcomer.close()

    @invariant()
    def the_file_stays_small(self) -> None:
        assert (self.folder / "lock").stat().st_size < 8192


TestLockModel = LockModel.TestCase
TestLockModel.settings = settings(stateful_step_count=20)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/absolute", "", "a/b", "nul\0", "x" * 5000, "é", "\x1b[31m"])
def test_the_job_of_a_base_model_of_any_name_has_its_lock_in_the_store(store: Store, name: str) -> None:
    with store.job(name):
        path = store.paths.job(name)
        assert path.parent == store.paths.root / "jobs"
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
    first = FileLock(path, patience=Patience(0), command="first")
    first.hold()
    second = FileLock(path, patience=Patience(0), command="second")
    with pytest.raises(StoreLocked, match="is in use"):
        second.share()
    for lock in (first, second):
        lock.close()


def test_the_message_says_how_long_was_waited_and_what_it_was_for(tmp_path: Path) -> None:
    holder = FileLock(tmp_path / "lock", patience=Patience(0), command="icm train", subject="base model 'x'")
    holder.hold()
    waiter = FileLock(tmp_path / "lock", patience=Patience(0.25), command="icm evict", subject="base model 'x'")
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
    lock = FileLock(path, patience=Patience(0), command="icm ls", writable=False)
    lock.share()
    assert path.read_bytes() == b""
    lock.close()
    lock = FileLock(path, patience=Patience(0), command="icm ls")
    lock.share()
    assert path.read_text() == f"{os.getpid()} icm ls\n"
    lock.close()
