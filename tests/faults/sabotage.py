"""Wrong orders of writing, put into a child to show that the harness sees them, and kills where no failpoint is."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from registry import files as fs


def rows_first() -> None:
    """Record rows before their bytes are in place, which the store never does."""
    from registry.storage.blobs.local import LocalBackend, LocalBatch
    from registry.tables.bundles import Bundles
    from registry.tables.codes import Codes
    from registry.tables.tasks import Tasks

    publish, size = LocalBatch.publish, LocalBackend.size
    waiting: list[LocalBatch] = []

    def later(self: LocalBatch) -> None:
        waiting.append(self)

    def size_of(self: LocalBackend, digest: str) -> int:
        for batch in waiting:
            if (temporary := batch._written.get(digest)) is not None:
                return temporary.stat().st_size
        return size(self, digest)

    def before_bytes(record: Callable[..., Any]) -> Callable[..., Any]:
        def rows_then_bytes(self: Any, *arguments: Any) -> Any:
            outcomes = record(self, *arguments)
            for batch in waiting:
                publish(batch)
            waiting.clear()
            return outcomes

        return rows_then_bytes

    LocalBatch.publish, LocalBackend.size = later, size_of  # type: ignore[method-assign]
    for part, name in ((Tasks, "ingest"), (Bundles, "add"), (Codes, "replace_residual")):
        setattr(part, name, before_bytes(getattr(part, name)))


def files_first() -> None:
    """Delete originals before their rows say that they are evicted, which the store never does."""
    from registry.tables.eviction import Originals
    from registry.tables.tasks import Tasks

    evict = Originals.evict

    def unlink_then_evict(self: Originals, eviction: Any, *rest: Any) -> int:
        adapters = Tasks(self._upkeep, self._lock, self._db, self._blobs).adapters(eviction.task)
        self._blobs.delete(row.weights for row in adapters)
        return evict(self, eviction, *rest)

    Originals.evict = unlink_then_evict  # type: ignore[method-assign]


def in_place() -> None:
    """Write an output folder file by file where it will be, the configuration first."""
    from icmlora.io import staging as output_folder

    def write(directory: Path, files: Mapping[str, bytes], *, force: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in sorted(files.items(), reverse=True):
            with (directory / name).open("wb") as file:
                for at in range(0, len(data), 256):
                    fs.write(file.fileno(), data[at : at + 256])
                    os.fsync(file.fileno())
                    time.sleep(0.005)  # on a fast disk a kill at a random time would hardly ever fall in between

    output_folder.write_folder = write


def bundle_in_place() -> None:
    """Write a bundle where it will be, part by part."""
    from icmlora.bundle import file as bundle

    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            time.sleep(0.02)  # as above
            return super().write(data)

    @contextmanager
    def writing(path: Path, *, force: bool = False) -> Iterator[io.FileIO]:
        with Slow(path, "w") as stream:
            yield stream

    bundle.writing_file = writing  # type: ignore[attr-defined]


def die_at_output_call() -> None:
    """Die before the n-th call that makes output durable or gives it its name, n from ICM_TEST_CALL."""
    from icmlora.io import staging

    mortal, calls = _mortal(), dict(vars(fs))
    for name in ("write_file", "fsync", "fsync_dir", "replace", "exchange"):
        calls[name] = mortal(calls[name])
    staging.fs = SimpleNamespace(**calls)  # type: ignore[assignment]


def _mortal() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes a function one of those before whose n-th call, of all together, the process dies."""
    left = [int(os.environ["ICM_TEST_CALL"])]

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    return mortal
