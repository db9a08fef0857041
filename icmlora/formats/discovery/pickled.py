"""Convert adapters whose weights are a pickle (`adapter_model.bin`), at the user's request only.

`torch.load(weights_only=True)` reads each in its own process (`pickle_child.py`) with memory and time limits. That
process gets two open files and no path, and its output is checked like any untrusted file.
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
"""Header key for the digest of the pickle in converted weights."""

_RESAVE = "save it as safetensors where it was trained"


@dataclass(frozen=True)
class PickleLimits:
    """Resource limits for reading a pickle, in addition to PyTorch's own use."""

    memory: int = 256 << 20
    memory_per_byte: int = 4
    seconds: int = 30
    seconds_per_gigabyte: int = 30
    wall_seconds: int = 120  # extra, for a slow process start


class PickleReader:
    """Converts pickles to safetensors, each in its own process, forked from a common parent.

    Args:
        limits: Limits of each process.
    """

    def __init__(self, limits: PickleLimits = PickleLimits()) -> None:
        self._limits = limits
        self._forker = Forker(pickle_child.__file__)

    def __enter__(self) -> Self:
        """Start nothing yet: few adapters are pickles."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Kill the parent process."""
        self._forker.__exit__(kind, error, at)

    def convert(self, source: Path, target: Path, name: str) -> None:
        """Write the tensors of a pickle as safetensors, with its name and digest in the header.

        Raises:
            UnsafeInput: It holds other objects, or exceeds the limits.
            AdapterRefused: It is not a pickle.
        """
        if sys.platform != "linux":  # the limits and the transfer of descriptors need Linux
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
    """Yield the tasks with safetensors instead of pickles, and refusals by path of the pickle."""
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
        fact, kind = f"the pickle reader exited with status {status}", "pickle"
    return UnsafeInput(fact, kind=kind, hint=_RESAVE)
