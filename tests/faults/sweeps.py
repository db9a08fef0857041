"""Fault injection into small registry commands: each call, statement and request fails once.

    kills        SIGKILL at a random time
    power        unsynced data is lost, completely, partly or not at all
    calls        the n-th call of the file system fails, once or from then on; or every write takes a few bytes only
    sqlite       the n-th call of SQLite fails, once or from then on; or half of the bytes are written, and no more
    statements   the connection to the database ends before the n-th statement reaches the server, or after it ran
    restarts     the database server ends at once, at a random time, and starts again
    requests     the object store answers the n-th request with an error, half a body, another bit, late, or never

After each: the command succeeded, or there was one error of the store. Nothing that it acknowledged is lost, the store
is sound, and a retry of the command reaches the same result as an undisturbed run.
"""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from registry import files as fs
from registry.errors import DamagedStore, RegistryError, TaskNotFound
from registry.store import Store
from tests.faults.campaign import kill
from tests.faults.pairs import Pair
from tests.faults.power import Disk, python, trace
from tests.faults.sqlite_calls import EIO, ENOSPC, failing
from tests.faults.zygote import KILLED, SMALL, Run, Zygote
from tests.pg_proxy import Cut, CuttingServer
from tests.pg_server import restart_server
from tests.registry.writing import COMMANDS, FACTS, Place, contents
from tests.s3_faults import Answer, Fault, FaultyServer, flipped, refuses, sleeps

IsReached = Callable[[], bool]
Injected = AbstractContextManager[IsReached]

_EMPTY = "empty"
_CALLS = ("create", "write", "fsync", "replace", "unlink", "make_dir")
_IN_A_ROW = 3
_ONCE, _ALWAYS = 1, float("inf")
_FAILING = ((errno.EIO, _ONCE), (errno.EMFILE, _ONCE), (errno.ENOSPC, _ALWAYS), (errno.EACCES, _ALWAYS))
_FAILING_SQLITE: dict[str, Callable[[int], Injected]] = {
    "EIO": partial(failing, codes=EIO, times=_ONCE),
    "EIO from then on": partial(failing, codes=EIO, times=_ALWAYS),
    "ENOSPC from then on": partial(failing, codes=ENOSPC, times=_ALWAYS, is_torn=True),
}
_LATE = 1.5  # seconds


@dataclass
class Tally:
    """The results of many faults."""

    faults: int = 0
    refused: int = 0
    """The command ended with an error of the store."""
    unexpected: int = 0
    """It ended with another error, or its retry failed."""
    acknowledged: int = 0
    """Facts that the commands had acknowledged; each must still be there."""
    lost: int = 0
    problems: int = 0
    """Problems that `icm verify --read-data` finds, at once or after a retry."""
    other_ends: int = 0
    """A retry reached another result than an undisturbed run."""
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.unexpected or self.lost or self.problems or self.other_ends)

    def count(self, kind: str, number: int, what: str) -> None:
        """Count something bad, and keep the first few."""
        setattr(self, kind, getattr(self, kind) + number)
        if number and len(self.examples) < 5:
            self.examples.append(what)


class Sweeps:
    """Faults on one pair.

    Args:
        pair: The pair; its store is created again.
        folder: A folder for other files.
    """

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.folder = pair, folder
        self.pair.clear()
        self.pair.make()
        self.pair.save(_EMPTY)
        self._runs = 0
        self._ends = {name: self._end_of(name) for name in COMMANDS}

    def calls(self, names: Iterable[str] = COMMANDS, *, stride: int = 1) -> Tally:
        """Make each call of the file system fail."""
        tally = Tally()
        for name in names:
            for code, times in _FAILING:
                fault = partial(_calls, code=code, times=times)
                self._try_each(tally, name, f"{errno.errorcode[code]} at call", fault, stride)
            self._try(tally, name, "short writes", _short_writes())
        return tally

    def sqlite(self, names: Iterable[str] = COMMANDS, *, stride: int = 1) -> Tally:
        """Make each call of SQLite fail."""
        tally = Tally()
        for name in names:
            for what, fault in _FAILING_SQLITE.items():
                self._try_each(tally, name, f"{what} at call of SQLite", fault, stride)
        return tally

    def _try_each(self, tally: Tally, name: str, what: str, fault: Callable[[int], Injected], stride: int) -> None:
        """Inject a fault at the first call, then at later ones, until the command makes no more."""
        number = 1
        while self._try(tally, name, f"{what} {number}", fault(number)):
            number += stride

    def statements(self, names: Iterable[str] = COMMANDS, *, stride: int = 1) -> Tally:
        """Cut the connection at each statement, alone, or with everything else from then on."""
        assert self.pair.postgres is not None
        tally = Tally()
        with _folder_of_socket() as folder, CuttingServer(self.pair.postgres, folder).running() as server:
            address = server.address(self.pair.address)
            for name in names:
                self.pair.put_back(_EMPTY)
                server.begin(None)
                COMMANDS[name](Place(partial(self.pair.open, address), self.folder))
                for number in range(1, server.statements + 1, stride):
                    for cut in (Cut(number, "before"), Cut(number, "after"), Cut(number, "after", is_away=True)):
                        self._try(tally, name, str(cut), _cut(server, cut), address)
        return tally

    def restarts(self, names: Iterable[str], count: int, draw: random.Random) -> Tally:
        """Restart the database server at random times, several times during each command."""
        assert self.pair.postgres is not None
        tally = Tally()
        for name in names:
            for _ in range(count):
                after = draw.uniform(0.0, 0.5)
                self._try(tally, name, f"a restart after {after:.3f} s", _restart(self.pair.postgres, after))
        return tally

    def requests(self, names: Iterable[str] = COMMANDS, *, stride: int = 1) -> Tally:
        """Make each request to the object store fail, in each of several ways."""
        tally, kinds = Tally(), _request_faults()
        with FaultyServer(os.environ["AWS_ENDPOINT_URL"]).running() as server, _impatient():
            for name in names:
                self.pair.put_back(_EMPTY)
                server.requests.clear()
                with _requests(server, Fault(times=0)):
                    COMMANDS[name](Place(self.pair.open, self.folder))
                count = len(server.requests)
                for number in range(0, count, stride):
                    kind = [*kinds][(number // stride) % len(kinds)]
                    fault = replace(kinds[kind], skip=number)
                    self._try(tally, name, f"{kind}, request {number} of {count}", _requests(server, fault))
        return tally

    def _end_of(self, name: str) -> object:
        self.pair.put_back(_EMPTY)
        place = Place(self.pair.open, self.folder)
        COMMANDS[name](place)
        return contents(place)

    def _try(self, tally: Tally, name: str, what: str, injected: Injected, address: str = "") -> bool:
        """Run a command with a fault and check the result; return whether the fault was reached."""
        self.pair.put_back(_EMPTY)
        told: list[str] = []
        place, what = Place(partial(self.pair.open, address), self.folder, told.append), f"{name}: {what}"
        is_refused = False
        with injected as is_reached:
            try:
                COMMANDS[name](place)
            except RegistryError:
                is_refused = True
            except Exception as error:
                tally.count("unexpected", 1, f"{what}: {error!r}")
        if not is_reached():
            return False
        tally.faults += 1
        tally.refused += is_refused
        self._look(tally, what, told)
        self._end(tally, name, what)
        return True

    def kills(self, zygote: Zygote, names: Iterable[str], count: int, draw: random.Random, sabotage: str = "") -> Tally:
        """Kill each command `count` times, at random times; complete it after one to three kills."""
        tally = Tally()
        for name in names:
            longest, killed = self._seconds(zygote, name), 0
            while killed < count:
                self.pair.put_back(_EMPTY)
                for _ in range(draw.randint(1, _IN_A_ROW)):
                    ran = self._run(zygote, name, draw.uniform(0.0, longest), sabotage)
                    if ran.status != KILLED:
                        break
                    killed += 1
                    tally.faults += 1
                    self._look(tally, f"{name}: killed", [line for line in ran.lines if line in FACTS])
                if not sabotage:
                    self._end(tally, name, f"{name}: killed")
        return tally

    def power_losses(self, names: Iterable[str], count: int, draw: random.Random, sabotage: str = "") -> Tally:
        """Simulate power losses of this machine during each command, and continue with a possible state of its disk.

        If rows or bytes are on another machine, the power is lost after the last call: they have the state at the end.
        """
        tally, before, log = Tally(), self.folder / "before", self.folder / "strace"
        store = self.pair.folder.resolve()
        for name in names:
            self.pair.put_back(_EMPTY)
            shutil.rmtree(before, ignore_errors=True)
            shutil.copytree(store, before)
            command = python("tests.faults.small", name, str(self.folder), *([sabotage] if sabotage else []))
            disk = Disk(store, before, trace(command, {"ICM_STORE": self.pair.address}, log))
            for _ in range(count):
                when = draw.randrange(disk.length + 1) if self.pair.is_plain else disk.length
                disk.crash(when, draw, store)
                tally.faults += 1
                what = f"{name}: power lost at call {when} of {disk.length}"
                self._look(tally, what, [fact for at, fact in disk.told if at < when])
                if not sabotage and self.pair.is_plain:
                    self._end(tally, name, what)
        return tally

    def _seconds(self, zygote: Zygote, name: str) -> float:
        self.pair.put_back(_EMPTY)
        began = time.monotonic()
        ran = self._run(zygote, name)
        assert ran.status == 0, ran.lines
        return time.monotonic() - began

    def _run(self, zygote: Zygote, name: str, after: float = math.inf, sabotage: str = "") -> Run:
        self._runs += 1
        then = None if after == math.inf else partial(kill, after=after)
        env = {"ICM_STORE": self.pair.address, **self.pair.environment}
        out = self.folder / f"log-{self._runs}"
        return zygote.run([SMALL, name, self.folder], env=env, out=out, sabotage=sabotage, then=then)

    def _look(self, tally: Tally, what: str, told: Sequence[str]) -> None:
        """Check that the store is sound and still has every acknowledged fact."""
        tally.acknowledged += len(told)
        with self.pair.open() as store:
            lost = [fact for fact in told if not _holds(store, fact) and f"no {fact}" not in told]
            found = [finding for finding in store.verify(read_data=True) if finding.is_problem]
        tally.count("lost", len(lost), f"{what}: lost {lost}")
        tally.count("problems", len(found), f"{what}: {found[:1]}")

    def _end(self, tally: Tally, name: str, what: str) -> None:
        """Run the same command to its end."""
        place, what = Place(self.pair.open, self.folder), f"{what}, again"
        try:
            COMMANDS[name](place)
        except Exception as error:
            tally.count("unexpected", 1, f"{what}: {error!r}")
            return
        self._look(tally, what, [])
        tally.count("other_ends", contents(place) != self._ends[name], f"{what}: another end")


def _holds(store: Store, fact: str) -> bool:
    try:
        return FACTS[fact](store)
    except (DamagedStore, TaskNotFound):
        return False


@contextmanager
def _calls(number: int, code: int, times: float) -> Iterator[IsReached]:
    """Make the n-th call fail, and `times` - 1 calls after it."""
    count = 0

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal count
            count += 1
            if number <= count < number + times:
                raise OSError(code, os.strerror(code))
            return real(*arguments)

        return call

    with mock.patch.multiple(fs, **{name: failing(getattr(fs, name)) for name in _CALLS}):
        yield lambda: count >= number


@contextmanager
def _short_writes() -> Iterator[IsReached]:
    """Make the kernel accept only seven bytes of each write."""

    class Short:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: memoryview) -> int:
            return os.write(descriptor, data[:7])

    with mock.patch.object(fs, "os", Short()):
        yield lambda: True


@contextmanager
def _cut(server: CuttingServer, cut: Cut) -> Iterator[IsReached]:
    server.begin(cut)
    yield lambda: cut.is_done
    server.begin(None)


@contextmanager
def _restart(server: str, after: float) -> Iterator[IsReached]:
    def run() -> None:
        time.sleep(after)
        restart_server(server)

    thread = threading.Thread(target=run)
    thread.start()
    yield lambda: True
    thread.join()


@contextmanager
def _requests(server: FaultyServer, fault: Fault) -> Iterator[IsReached]:
    server.faults = [fault]
    with mock.patch.dict(os.environ, AWS_ENDPOINT_URL=server.endpoint):
        yield lambda: fault.seen > 0
    server.faults = []


@contextmanager
def _impatient() -> Iterator[None]:
    """Shorten waits of a minute to a second."""
    from registry.storage.blobs import objects

    with mock.patch.multiple(objects, _SILENCE=1, _DEADLINE=1.5):
        yield


@contextmanager
def _folder_of_socket() -> Iterator[Path]:
    """Yield a folder with a short path, as sockets require."""
    folder = Path(tempfile.mkdtemp(prefix="icm-", dir="/tmp"))  # made for this alone
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _request_faults() -> dict[str, Fault]:
    def lost(answer: Answer) -> None:
        answer.is_lost = True

    def cut(answer: Answer) -> None:
        answer.cut = len(answer.body) // 2

    def flip(answer: Answer) -> None:
        answer.body = flipped(answer.body)

    return {
        "500": Fault(before=refuses(500)),
        "503 twice": Fault(times=2, before=refuses(503)),
        "no answer": Fault(after=lost),
        "half a body": Fault(after=cut),
        "403": Fault(before=refuses(403)),
        "another bit comes": Fault(after=flip),
        "another bit is sent": Fault("PUT", before=flipped),
        "late": Fault(before=sleeps(_LATE)),
        "away from then on": Fault(times=_ALWAYS, before=refuses(503)),
    }
