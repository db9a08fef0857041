"""Adapters whose weights are a pickle (`adapter_model.bin`), read only where the user asks for it.

`torch.load(weights_only=True)` reads each in a process of its own (`pickle_child.py`) with limits of memory and time.
That process is given two open files and no path, and what it writes is checked like any file from outside.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from icmlora.errors import AdapterRefused, UnsafeInput, located
from icmlora.formats.discovery import pickle_child
from icmlora.formats.discovery.found import FoundAdapter, FoundTask
from icmlora.io.child import Forker
from icmlora.io.files import hash_open, open_regular, read_exactly
from icmlora.io.safetensors import MAX_FILE_BYTES

CONVERTED_FROM = "converted_from_sha256"
"""Where the header of converted weights has the digest of their pickle."""

_RESAVE = "save it as safetensors where it was trained"


@dataclass(frozen=True)
class PickleLimits:
    """What reading a pickle may take, in addition to what PyTorch takes by itself."""

    memory: int = 256 << 20
    memory_per_byte: int = 4
    seconds: int = 30
    seconds_per_gigabyte: int = 30
    wall_seconds: int = 120  # in addition, for a slow start of the process


class PickleReader:
    """Converts pickles to safetensors, each in a process of its own; all of them are forked from one.

    Args:
        limits: What each may take.
    """

    def __init__(self, limits: PickleLimits = PickleLimits()) -> None:
        self._limits = limits
        self._forker = Forker(pickle_child.__file__)

    def __enter__(self) -> Self:
        """Start nothing yet: most adapters are no pickles."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process that the others are forked from."""
        self._forker.__exit__(kind, error, at)

    def convert(self, source: Path, target: Path, name: str) -> None:
        """Write the tensors of a pickle as safetensors; its name and its digest go into the header.

        Raises:
            UnsafeInput: It holds something else, or takes more than the limits.
            AdapterRefused: It is no pickle.
        """
        if sys.platform != "linux":  # the limits, and how the process is sent files, are those of Linux
            raise UnsafeInput("a pickle, which icm reads on Linux only", kind="pickle", path=source, hint=_RESAVE)
        with located(source), open_regular(source, max_bytes=MAX_FILE_BYTES) as (descriptor, size):
            if read_exactly(descriptor, min(size, 8), 0) == b"version ":
                raise AdapterRefused("a Git LFS pointer, not the file itself", kind="lfs", hint="run 'git lfs pull'")
            metadata = {"converted_from": name, CONVERTED_FROM: hash_open(descriptor, size), "format": "pt"}
            memory = self._limits.memory + self._limits.memory_per_byte * size
            seconds = self._limits.seconds + self._limits.seconds_per_gigabyte * size // 10**9
            order = json.dumps({"metadata": metadata, "memory": memory, "seconds": seconds})
            wall = self._limits.wall_seconds + 2 * seconds
            with target.open("wb") as output:
                status = self._forker.run(order, descriptor, output.fileno(), wall_seconds=wall)
            if status != 0:
                raise _refusal(status, memory, seconds)


@contextmanager
def converted(
    tasks: Sequence[FoundTask], reader: PickleReader
) -> Iterator[tuple[list[FoundTask], Mapping[Path, AdapterRefused]]]:
    """Yield the tasks with safetensors in place of their pickles, and why a pickle was not read, by its path."""
    refused: dict[Path, AdapterRefused] = {}
    if not any(found.pickle for task in tasks for found in task.adapters):
        yield list(tasks), refused
        return
    with tempfile.TemporaryDirectory(prefix="icm-") as name:
        folder = Path(os.path.realpath(name))
        done: dict[Path, Path] = {}

        def convert(found: FoundAdapter) -> FoundAdapter:
            if found.pickle is None or found.weights in refused:
                return found
            if found.weights not in done:
                target = folder / f"{len(done)}.safetensors"
                try:
                    reader.convert(found.weights, target, found.pickle)
                except AdapterRefused as error:
                    refused[found.weights] = error
                    return found
                done[found.weights] = target
            return replace(found, weights=done[found.weights])

        yield [replace(task, adapters=tuple(map(convert, task.adapters))) for task in tasks], refused


def _refusal(status: int | None, memory: int, seconds: int) -> AdapterRefused:
    if status in (None, -signal.SIGXCPU):
        fact, kind = f"a pickle that takes more than {seconds} s to read", "limits"
    elif status in (pickle_child.NO_MEMORY, -signal.SIGABRT, -signal.SIGKILL, -signal.SIGXFSZ):
        fact, kind = f"a pickle that needs more than {memory >> 20} MiB to read", "limits"
    elif status == pickle_child.TOO_LARGE:
        fact, kind = "a pickle whose tensors are far larger than the file", "limits"
    elif status == pickle_child.NOT_TENSORS:
        fact, kind = "a pickle that holds more than named tensors", "pickle"
    elif status == pickle_child.BROKEN:
        fact, kind = "a pickle that is damaged or runs code; no code was run", "pickle"
    else:
        fact, kind = f"the process that reads pickles ended with status {status}", "pickle"
    return UnsafeInput(fact, kind=kind, hint=_RESAVE)
