"""No two commands deadlock, in any order of their lock requests.

Two threads have the locks of two processes. They alternate at attempts to acquire one, in every order with a few
switches at any moment: a thread that has to wait also lets the other one continue.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest

from registry.storage.locks import flocks
from registry.storage.locks.flocks import FileLock
from tests.registry.lock_scripts import SCRIPTS, Holder, encode, evict, train

Script = Callable[[Holder], None]
_STUCK = 4  # failed attempts in a row; by then, each thread has released all locks that it releases


class Stuck(Exception):
    """Each waits for the other."""


class Actor(threading.Thread):
    """Runs a script, and stops before each attempt to take a lock until it is its turn."""

    def __init__(self, script: Script, folder: Path) -> None:
        super().__init__(daemon=True)
        self._script, self._folder = script, folder
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.failed, self.is_done, self._ends = 0, False, False

    def run(self) -> None:
        holder = Holder(self._folder, self._script.__name__)
        try:
            self._go.acquire()
            self._script(holder)
        except Stuck:
            pass
        finally:
            holder.store.close()
            self.is_done = True
            self._stopped.release()

    def step(self, *, end: bool = False) -> None:
        """Run it until its next attempt or its end."""
        self._ends = end
        self._go.release()
        self._stopped.acquire()

    def attempt(self, take: Callable[[], bool]) -> bool:
        self._stopped.release()
        self._go.acquire()
        if self._ends:
            raise Stuck
        taken = take()
        self.failed = 0 if taken else self.failed + 1
        return taken


@pytest.fixture(autouse=True)
def in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop actors before each attempt, and make waits return at once."""
    real = flocks._try

    def attempt(fd: int, kind: int) -> bool:
        actor = threading.current_thread()
        return actor.attempt(lambda: real(fd, kind)) if isinstance(actor, Actor) else real(fd, kind)

    monkeypatch.setattr(flocks, "_try", attempt)
    monkeypatch.setattr(flocks, "HEAD_START", math.inf)  # new readers wait without a limit
    monkeypatch.setattr(flocks, "_lock_holders", lambda file: set())
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def run(scripts: tuple[Script, ...], folder: Path, switches: tuple[int, ...]) -> int:
    """Run scripts in turns, with a switch before some steps, and return how many there are; raise if they are stuck."""
    actors = [Actor(script, folder) for script in scripts]
    for actor in actors:
        actor.start()
    steps = 0
    try:
        while running := [actor for actor in actors if not actor.is_done]:
            if all(actor.failed >= _STUCK for actor in running):
                raise Stuck(" and ".join(script.__name__ for script in scripts), switches)
            if steps in switches or actors[0].failed or actors[0].is_done:
                actors.append(actors.pop(0))
            if not actors[0].is_done:
                actors[0].step()
            steps += 1
        return steps
    finally:
        for actor in actors:
            while not actor.is_done:
                actor.step(end=True)
            actor.join()


def explore(scripts: tuple[Script, ...], folder: Path, most: int) -> Iterator[tuple[int, ...]]:
    """Run scripts with every choice of up to `most` switches, and yield the choices."""
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        switches = waiting.pop()
        steps = run(scripts, folder, switches)
        yield switches
        if len(switches) < most:
            waiting += [(*switches, step) for step in range(switches[-1] + 1 if switches else 0, steps)]


@pytest.mark.parametrize("first", SCRIPTS)
def test_no_pair_of_commands_waits_for_each_other(tmp_path: Path, first: Script) -> None:
    for second in SCRIPTS:
        assert len(list(explore((first, second), tmp_path, 1))) > 2


@pytest.mark.fault
@pytest.mark.parametrize("pair", list(product(SCRIPTS, SCRIPTS)))
def test_no_pair_of_commands_waits_for_each_other_with_more_switches(tmp_path: Path, pair: tuple[Script, ...]) -> None:
    assert len(list(explore(pair, tmp_path, 2))) > 2


def test_three_commands_do_not_wait_in_a_circle(tmp_path: Path) -> None:
    for three in product((evict, train, encode), repeat=3):
        list(explore(three, tmp_path, 0))
    assert len(list(explore((evict, encode, train), tmp_path, 1))) > 2


def test_the_harness_sees_two_that_wait_for_a_job_while_they_hold_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_in_a_job(holder: Holder) -> None:
        holder.store.enter()
        with holder.job():
            holder.alone()

    real = FileLock.hold
    monkeypatch.setattr(FileLock, "hold", lambda self, shared=False, without=None: real(self, shared=shared))
    with pytest.raises(Stuck):
        list(explore((delete_in_a_job, train), tmp_path, 2))


def test_the_harness_sees_two_that_wait_to_be_alone_while_they_hold_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileLock, "_given_up", lambda self: nullcontext())
    with pytest.raises(Stuck):
        list(explore((evict, evict), tmp_path, 2))
