"""Wrong orders of writing, put into a child to show that the harness sees them, and kills before the n-th step."""

from __future__ import annotations

import io
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from registry import files as fs


def refs_first() -> None:
    """Move refs before blobs and manifests are in place, which the store never does."""
    from registry.storage.blobs.local import LocalBatch
    from registry.storage.blobs.objects import ObjectBackend, ObjectBatch
    from registry.storage.database import Database

    write, publish, send = Database.write, LocalBatch.publish, ObjectBackend.put
    waiting: list[Callable[[], object]] = []

    @contextmanager
    def refs_then_bytes(self: Database) -> Iterator[Any]:
        with write(self) as connection:
            yield connection
        fs.failpoint("rows-committed")
        time.sleep(0.05)  # a kill at a random time would hardly ever fall in between
        while waiting:
            waiting.pop(0)()

    def put_later(self: ObjectBatch, digest: str, data: fs.Bytes) -> bool:
        waiting.append(lambda: send(self._backend, digest, data))
        return True

    Database.write = refs_then_bytes  # type: ignore[method-assign]
    LocalBatch.publish = lambda self: waiting.append(partial(publish, self))  # type: ignore[method-assign]
    ObjectBatch.put = put_later  # type: ignore[method-assign]


def errors_ignored() -> None:
    """Ignore the error of every other put, which the store never does."""
    from registry.errors import RegistryError
    from registry.storage.blobs.local import LocalBatch
    from registry.storage.blobs.objects import ObjectBatch

    def ignoring(put: Callable[..., bool]) -> Callable[..., bool]:
        def put_or_not(self: Any, digest: str, data: fs.Bytes) -> bool:
            with suppress(RegistryError):
                if int(digest[0], 16) % 2:
                    raise RegistryError("there is no space, or no bucket")
                return put(self, digest, data)
            return True

        return put_or_not

    for batch in (LocalBatch, ObjectBatch):
        batch.put = ignoring(batch.put)  # type: ignore[method-assign]


def without_lock() -> None:
    """Delete without the exclusive lock, which the store never does; stop at a failpoint."""
    from registry.storage.locks.advisory import AdvisoryLock
    from registry.storage.locks.flocks import FileLock

    stops()
    for lock in (AdvisoryLock, FileLock):
        lock.exclusive = lambda self: nullcontext()  # type: ignore[assignment,misc,return-value]


def files_first() -> None:
    """Delete originals before the manifest records their eviction, which the store never does."""
    from registry.manifests import Task
    from registry.store import Store

    update = Store.update

    def delete_then_update(self: Store, name: str, change: Callable[[Task], Task]) -> Task:
        evicted = [one.weights for one in change(self.task(name)).adapters if one.is_evicted]
        self.blobs.delete(evicted, newest=math.inf)
        return update(self, name, change)

    Store.update = delete_then_update  # type: ignore[method-assign]


def without_sync() -> None:
    """Never wait until bytes or names are on the device, which the store always does before a ref moves."""
    fs.fsync = lambda descriptor: None  # type: ignore[assignment]


def stops() -> None:
    """Stop at a failpoint, the first time, instead of dying there."""

    class Stop:
        @property
        def SIGKILL(self) -> int:  # as the module has it
            return signal.SIGSTOP if os.environ.pop("ICM_FAILPOINT", None) else 0  # which is no signal

    fs.signal = Stop()  # type: ignore[assignment]


def clock_jumps() -> None:
    """Make the clock return another day each time."""
    real, draw = time.time, random.Random(1)
    time.time = lambda: real() + draw.uniform(-1e6, 1e6)


def in_place() -> None:
    """Write an output folder file by file at its final location, the configuration first."""
    from icmlora.io import staging as output_folder

    def write(directory: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in sorted(files.items(), reverse=True):
            with (directory / name).open("wb") as file:
                _write_in_pieces(file.fileno(), data)

    output_folder.write_folder = write


def bundle_in_place() -> None:
    """Write a bundle part by part at its final location."""
    from icmlora.bundle import file as bundle

    class Pieces(io.FileIO):
        def write(self, data: Any) -> int:
            return _write_in_pieces(self.fileno(), data)

    bundle.writing_file = lambda path, *, force=False: Pieces(path, "w")  # type: ignore[attr-defined]


def _write_in_pieces(descriptor: int, data: Any) -> int:
    for at in range(0, len(data), 256):
        fs.write(descriptor, data[at : at + 256])
    return len(data)


def die_at_step() -> None:
    """Die before the n-th step of a command, n from ICM_TEST_STEP: a call that changes a file, or a failpoint."""
    left, real = [int(os.environ["ICM_TEST_STEP"])], fs.failpoint

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return step

    for name in ("create", "write", "fsync", "fsync_dir", "replace", "exchange", "unlink", "make_dir"):
        setattr(fs, name, mortal(getattr(fs, name)))
    for module in list(sys.modules.values()):
        if getattr(module, "failpoint", None) is real:
            module.failpoint = mortal(real)  # type: ignore[attr-defined]
