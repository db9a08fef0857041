"""What the wrappers of other packages share: staged copies of the fleet, groups of like adapters, missing packages.

The packages take adapters of one rank and one set of modules, so a mixed fleet goes to them in groups. An adapter
without a companion is stored as bf16, and counts as such.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file

from icmlora.adapter.model import Adapter
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME
from tests.benchmarks.baselines.factors import factors_from_bytes, factors_to_bytes
from tests.benchmarks.baselines.head import Head
from tests.benchmarks.baselines.quantizers import Bf16
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.method import Coded


class PackageMissing(Exception):
    """A package that is compared with is not installed."""


@dataclass(frozen=True)
class Group:
    """What a package made of some adapters: bytes on disk, and folders rebuilt from them."""

    shared: int
    sizes: Mapping[str, int]
    rebuilt: Mapping[str, Path]


class Peer(Protocol):
    """A wrapper of one package."""

    @property
    def package(self) -> str:
        """Its name on PyPI."""
        ...

    def compress(self, staged: Mapping[str, Path], out: Path) -> Group:
        """Store some adapters of one layout under `out` and rebuild them from there."""
        ...


@dataclass(frozen=True)
class PeerMethod:
    """A package at one setting, as a method."""

    peer: Peer

    def identity(self) -> str:
        """Return the setting and the installed version."""
        return f"{self.peer} {installed_version(self.peer.package)}"

    def code(self, fleet: FleetFolder, work: Path) -> Coded:
        """Let the package store every group of two and more."""
        shared, sizes, rebuilt = 0, dict[str, int](), dict[str, Path]()
        alone: dict[str, bytes] = {}
        shutil.rmtree(work, ignore_errors=True)
        for number, tasks in enumerate(like_groups(fleet)):
            if len(tasks) == 1:
                alone[tasks[0]] = factors_to_bytes(fleet[tasks[0]], Bf16())
                continue
            folder = work / str(number)
            group = self.peer.compress(stage(fleet, tasks, folder / "staged"), folder / "stored")
            shared += group.shared
            sizes.update(group.sizes)
            rebuilt.update(group.rebuilt)
        sizes.update({task: len(code) for task, code in alone.items()})

        def decode(task: str) -> Adapter:
            return factors_from_bytes(alone[task], Bf16()) if task in alone else load_adapter(rebuilt[task])

        together = [size for task, size in sizes.items() if task not in alone]
        notes = {
            "package": self.peer.package,
            "version": installed_version(self.peer.package),
            "alone": sorted(alone),
            "marginal_in_groups": sum(together) / max(len(together), 1),
        }
        return Coded(shared, sizes, decode, notes)


def installed_version(package: str) -> str:
    """Return the version of a package.

    Raises:
        PackageMissing: It is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise PackageMissing(f"{package} is not installed: pip install {package}") from error


def imported(module: str) -> Any:
    """Import a module that carries no types."""
    return import_module(module)


def like_groups(fleet: Mapping[str, Adapter]) -> list[list[str]]:
    """Return the tasks in groups of one layout, in the fleet's order."""
    groups: dict[object, list[str]] = {}
    for task, adapter in fleet.items():
        groups.setdefault(adapter.layout, []).append(task)
    return list(groups.values())


def stage(fleet: FleetFolder, tasks: Sequence[str], root: Path, *, exact: bool = False) -> dict[str, Path]:
    """Copy configuration and weights of some adapters, widened to float32 unless `exact`."""
    staged = {}
    for task in tasks:
        staged[task] = root / task
        staged[task].mkdir(parents=True)
        shutil.copyfile(fleet.folder(task) / CONFIG_NAME, staged[task] / CONFIG_NAME)
        source = fleet.folder(task) / WEIGHTS_NAME
        if exact:
            shutil.copyfile(source, staged[task] / WEIGHTS_NAME)
        else:
            tensors = {name: tensor.float() for name, tensor in load_file(source).items()}
            save_file(tensors, staged[task] / WEIGHTS_NAME, metadata={"format": "pt"})
    return staged


def head_size(folder: Path) -> int:
    """Return what the configuration of an adapter takes in the compact form that all methods are counted with."""
    return len(Head.of(load_adapter(folder)).to_bytes())


def disk_size(path: Path) -> int:
    """Return the bytes of a file, or of all files under a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
