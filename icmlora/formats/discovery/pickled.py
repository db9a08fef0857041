"""Convert adapters whose weights are a pickle (`adapter_model.bin`), at the user's request only.

`torch.load(weights_only=True)` reads each in a sandbox (`pickle_child.py`). Its output is checked like any untrusted
file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput, located
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.format import FoundAdapter
from icmlora.io.files import hash_open, open_regular, read_exactly
from icmlora.io.safetensors import MAX_FILE_BYTES
from icmlora.io.sandbox import NO_MEMORY, TOO_SLOW, UNAVAILABLE, Sandbox, SandboxLimits

CONVERTED_FROM = "converted_from_sha256"
"""Header key for the digest of the pickle in converted weights."""

BROKEN, NOT_TENSORS, TOO_LARGE = 10, 11, 12
"""Statuses of `pickle_child`."""
LIMITS = SandboxLimits(seconds_per_byte=30 / 10**9)


class PickleReader(Sandbox):
    """Converts pickles to safetensors.

    Args:
        limits: SandboxLimits for each pickle.
    """

    def __init__(self, limits: SandboxLimits = LIMITS) -> None:
        super().__init__("icmlora.formats.discovery.pickle_child")
        self.limits = limits

    def convert(self, source: Path, target: Path, name: str) -> None:
        """Write the tensors of a pickle as safetensors, with its name and digest in the header.

        Raises:
            UnsafeInput: It holds other objects, or exceeds the limits.
            AdapterRefused: It is not a pickle.
        """
        with located(source), open_regular(source, max_bytes=MAX_FILE_BYTES) as (descriptor, size):
            if read_exactly(descriptor, min(size, 8), 0) == b"version ":
                raise AdapterRefused("a Git LFS pointer, not the file itself", kind="lfs", hint="run 'git lfs pull'")
            metadata = {"converted_from": name, CONVERTED_FROM: hash_open(descriptor, size), "format": "pt"}
            with target.open("wb") as output:
                status = self.run({"metadata": metadata}, descriptor, output.fileno(), size, self.limits)
            memory, seconds = self.limits.for_size(size)
            fact, kind = {
                TOO_SLOW: (f"a pickle that takes more than {seconds} s to read", "limits"),
                NO_MEMORY: (f"a pickle that needs more than {memory >> 20} MiB to read", "limits"),
                UNAVAILABLE: ("a pickle, which icm reads on Linux only", "pickle"),
                BROKEN: ("a pickle that is damaged or runs code; no code was run", "pickle"),
                NOT_TENSORS: ("a pickle that holds more than named tensors", "pickle"),
                TOO_LARGE: ("a pickle whose tensors are far larger than the file", "limits"),
            }.get(status, (f"the pickle reader exited with status {status}", "pickle"))
            if status != 0:
                raise UnsafeInput(fact, kind=kind, hint="save it as safetensors where it was trained")


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
