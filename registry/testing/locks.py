"""What every kind of locks must do: promises one by one, in any order, and from several threads.

class TestMyLocks(LockPromises):
    def new_lock(self, store, deadline, command="icm") -> StoreLock:    what one process has of a store's locks
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from uuid import uuid4

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from registry.errors import StoreLocked
from registry.storage.locks import Deadline, StoreLock

_BASE, _OTHER = "base/model", "x" * 5000 + "\0é"
_THREADS, _ROUNDS = 6, 6
_LONG, _A_MOMENT = 60.0, 0.3
_STEPS = 25


class LockPromises:
    """The promises of a store's locks, as a class of tests for pytest."""

    def new_lock(self, store: str, deadline: Deadline, command: str = "icm") -> StoreLock:
        """Return what one more process has of the locks of a store; it holds nothing yet."""
        raise NotImplementedError

    @pytest.fixture
    def one(self) -> Iterator[StoreLock]:
        """What a process has that uses the store, and waits for nothing."""
        self.store = uuid4().hex
        with self._opened() as lock:
            yield lock

    @pytest.fixture
    def two(self, one: StoreLock) -> Iterator[StoreLock]:
        """What another process has."""
        with self._opened() as lock:
            yield lock

    @contextmanager
    def _opened(self, deadline: float = 0.0, command: str = "icm") -> Iterator[StoreLock]:
        with closing(self.new_lock(self.store, Deadline(deadline), command)) as lock:
            lock.enter()
            yield lock

    def _is_alone(self, lock: StoreLock) -> bool:
        with suppress(StoreLocked), lock.exclusive():
            return True
        return False

    def _may_enter(self) -> bool:
        with suppress(StoreLocked), self._opened():
            return True
        return False

    def test_many_share(self, one: StoreLock, two: StoreLock) -> None:
        assert self._may_enter()

    def test_nobody_else_gets_in_while_one_is_alone(self, one: StoreLock) -> None:
        with one.exclusive():
            assert not self._may_enter()
        assert self._may_enter()

    def test_one_that_wants_to_be_alone_waits_and_gives_up(self, one: StoreLock, two: StoreLock) -> None:
        with pytest.raises(StoreLocked, match="in use"), two.exclusive():
            pytest.fail("two held it")
        assert not self._is_alone(one)

    def test_afterwards_the_lock_is_shared_again(self, one: StoreLock) -> None:
        with one.exclusive():
            pass
        with self._opened() as other:
            assert not self._is_alone(other)
        assert self._is_alone(one)

    def test_one_that_gave_up_keeps_the_shared_lock(self, one: StoreLock, two: StoreLock) -> None:
        assert not self._is_alone(one)
        two.close()
        with self._opened() as other:
            assert not self._is_alone(other)
        assert self._is_alone(one)

    def test_an_error_inside_gives_the_lock_back(self, one: StoreLock) -> None:
        def fail(lock: AbstractContextManager[object]) -> None:
            with lock:
                raise LookupError

        for lock in (one.exclusive(), one.job(_BASE), one.job(_BASE, shared=True)):
            with pytest.raises(LookupError):
                fail(lock)
            assert self._may_enter()
        assert self._is_alone(one)
        with one.job(_BASE):
            pass

    def test_closing_lets_go_and_twice_is_once(self, one: StoreLock, two: StoreLock) -> None:
        two.close()
        two.close()
        assert self._is_alone(one)

    def test_stores_do_not_know_each_other(self, one: StoreLock) -> None:
        with closing(self.new_lock(uuid4().hex, Deadline(0))) as other:
            other.enter()
            with other.job(_BASE), one.job(_BASE):
                assert self._is_alone(one)

    def test_a_job_is_done_alone_or_shared(self, one: StoreLock, two: StoreLock) -> None:
        with one.job(_BASE):
            for shared in (False, True):
                with pytest.raises(StoreLocked, match="base model 'base/model'"), two.job(_BASE, shared=shared):
                    pytest.fail("two jobs at a time")
            with two.job(_OTHER):  # of another base model
                pass
        with one.job(_BASE, shared=True):
            with two.job(_BASE, shared=True):
                pass
            with pytest.raises(StoreLocked), two.job(_BASE):
                pytest.fail("it was not alone")
        with two.job(_BASE):
            pass

    def test_who_waits_in_vain_for_a_job_has_the_store_again(self, one: StoreLock, two: StoreLock) -> None:
        with one.job(_BASE), pytest.raises(StoreLocked), two.job(_BASE):
            pytest.fail("two jobs at a time")
        assert not self._is_alone(one)

    def test_who_waits_for_a_job_does_not_hold_the_store(self, one: StoreLock) -> None:
        entered, alone = threading.Event(), threading.Event()

        def work() -> None:
            with self._opened(_LONG) as other:
                entered.set()
                with other.job(_BASE):
                    assert alone.is_set()

        with ThreadPoolExecutor(1) as pool:
            with one.job(_BASE):
                working = pool.submit(work)
                entered.wait(_LONG)
                while not alone.is_set():  # once it waits
                    if self._is_alone(one):
                        alone.set()
            working.result()

    def test_one_that_waits_to_be_alone_goes_before_those_that_come_later(self, one: StoreLock) -> None:
        order, begun = list[str](), threading.Event()

        def delete() -> None:
            with self._opened(_LONG) as other:
                begun.set()
                with other.exclusive():
                    order.append("alone")

        def read() -> None:
            with self._opened(_LONG):
                order.append("read")

        with ThreadPoolExecutor(2) as pool:
            deleting = pool.submit(delete)
            begun.wait(_LONG)
            time.sleep(_A_MOMENT)
            reading = pool.submit(read)
            time.sleep(_A_MOMENT)
            one.close()
            deleting.result(), reading.result()
        assert order == ["alone", "read"]

    def test_readers_do_not_wait_long_for_one_that_cannot_be_alone(self, one: StoreLock) -> None:
        begun, gave_up = threading.Event(), threading.Event()

        def delete() -> None:
            with suppress(StoreLocked), self._opened(5.0) as other:
                begun.set()
                with other.exclusive():
                    pytest.fail("one uses the store")
            gave_up.set()

        with ThreadPoolExecutor(1) as pool:
            deleting = pool.submit(delete)
            begun.wait(_LONG)
            time.sleep(_A_MOMENT)
            with self._opened(_LONG):  # although the other one still waits
                assert not gave_up.is_set()
            deleting.result()

    def test_the_message_says_who_holds_it(self, one: StoreLock) -> None:
        told: list[str] = []
        command = "icm train with\na long line " + "x" * 300
        with closing(self.new_lock(self.store, Deadline(_LONG), command)) as holder:
            holder.enter()
            with closing(self.new_lock(self.store, Deadline(2.5, told.append))) as waiter:
                waiter.enter()
                one.close()
                with pytest.raises(StoreLocked) as caught, waiter.exclusive():
                    pytest.fail("it was not alone")
        assert caught.value.hint is not None
        assert "2.5 s" in caught.value.hint
        assert "\n" not in caught.value.message
        assert told
        assert all("waiting for" in text for text in told)

    def test_of_many_at_a_time_one_is_alone(self) -> None:
        self.store = uuid4().hex
        inside, seen = list[int](), list[int]()

        def work(who: int) -> None:
            for turn in range(_ROUNDS):
                with self._opened(_LONG) as lock, lock.job(f"{turn % 2}", shared=who % 2 == 0):
                    with lock.exclusive():
                        inside.append(who)
                        time.sleep(0.001)
                        assert inside == [who]
                        inside.remove(who)
                    seen.append(who)

        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(work, who) for who in range(_THREADS)]:
                done.result()
        assert len(seen) == _THREADS * _ROUNDS

    def test_in_any_order_the_locks_and_a_model_agree(self) -> None:
        model = type("LockModelOfOne", (LockModel,), {"promises": self})
        run_state_machine_as_test(model, settings=settings(stateful_step_count=_STEPS))


class LockModel(RuleBasedStateMachine):
    """Three processes, and what each of them holds of the store and of one job."""

    promises: LockPromises
    who = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.store = uuid4().hex
        self.locks = [self.opened() for _ in range(3)]
        self.inside = [False] * 3
        self.jobs: list[str | None] = [None] * 3
        self.leaving = [ExitStack() for _ in range(3)]

    def opened(self) -> StoreLock:
        return self.promises.new_lock(self.store, Deadline(0))

    def teardown(self) -> None:
        for number in range(3):
            self.leaving[number].close()
            self.locks[number].close()

    def others(self, who: int) -> list[int]:
        return [number for number in range(3) if number != who]

    @rule(who=who)
    def enter(self, who: int) -> None:
        if not self.inside[who]:
            self.locks[who].enter()
            self.inside[who] = True

    @rule(who=who)
    def let_go(self, who: int) -> None:
        self.end_the_job(who)
        self.locks[who].close()
        self.locks[who], self.inside[who] = self.opened(), False

    @rule(who=who, shared=st.booleans())
    def begin_a_job(self, who: int, shared: bool) -> None:
        if not self.inside[who] or self.jobs[who] is not None:
            return
        held = {self.jobs[number] for number in self.others(who)}
        job = self.locks[who].job(_BASE, shared=shared)
        if "alone" in held or (not shared and held != {None}):
            with pytest.raises(StoreLocked):
                self.leaving[who].enter_context(job)
        else:
            self.leaving[who].enter_context(job)
            self.jobs[who] = "shared" if shared else "alone"

    @rule(who=who)
    def end_the_job(self, who: int) -> None:
        self.leaving[who].close()
        self.jobs[who] = None

    @rule(who=who)
    def be_alone_for_a_block(self, who: int) -> None:
        if not self.inside[who]:
            return
        if any(self.inside[number] for number in self.others(who)):
            with pytest.raises(StoreLocked), self.locks[who].exclusive():
                pytest.fail("another one uses the store")
        else:
            with self.locks[who].exclusive():
                assert not self.newcomer_enters()

    def newcomer_enters(self) -> bool:
        with closing(self.opened()) as newcomer, suppress(StoreLocked):
            newcomer.enter()
            return True
        return False

    @invariant()
    def a_newcomer_may_enter(self) -> None:
        assert self.newcomer_enters()
