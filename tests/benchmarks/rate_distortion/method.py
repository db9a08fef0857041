"""What is compared: a method at one operating point turns a fleet into bytes and adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from icmlora.adapter.model import Adapter
from tests.benchmarks import baselines
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.benchmarks.rate_distortion.fleet import FleetFolder


@dataclass(frozen=True)
class Coded:
    """A fleet as a method stores it.

    Attributes:
        shared: Bytes stored once.
        sizes: Task to its own bytes.
        decode: Task to the adapter that is read back from these bytes.
        notes: What else is worth recording, such as a package's version.
    """

    shared: int
    sizes: Mapping[str, int]
    decode: Callable[[str], Adapter]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to store a fleet."""

    def identity(self) -> str:
        """Return a text that changes whenever the result may change, for a fleet that stays the same."""
        ...

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Store a fleet; `work` is a folder that may be used and is kept."""
        ...


@dataclass(frozen=True)
class Point:
    """An operating point of a family of methods; a family is one curve of the figure."""

    family: str
    name: str
    method: Method


@dataclass(frozen=True)
class Naive:
    """A baseline of the package, by name."""

    name: str

    def identity(self) -> str:
        """Return the name and a digest of the package's sources."""
        return f"{self.name} {sources_digest(baselines)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Encode every task."""
        method = baseline_named(self.name)
        shared = method.prepare(fleet)
        codes = {task: method.encode(fleet[task], shared) for task in fleet}
        sizes = {task: len(code) for task, code in codes.items()}
        return Coded(len(shared), sizes, lambda task: method.decode(codes[task], shared))


def sources_digest(package: ModuleType) -> str:
    """Return 12 digits that stand for a package's Python files."""
    total = hashlib.sha256()
    for folder in package.__path__:
        for path in sorted(Path(folder).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]
