"""What tests of the library ask of a store on disk, and listeners that hear and stop a use case."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from icmlora import Adapter, Cancelled, Event, Fleet
from registry.manifests import Generator, Task
from registry.store import Store

TASKS = ["poems", "rules", "silent"]
"""The tasks of the mixed fleet; `silent` has no text."""

Listener = Callable[[Event], None]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder with its bytes, but not the locks, in which each process leaves its name."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(("lock", "jobs"))}


def but_card(folder: Path) -> dict[str, bytes]:
    """Return the same without the card: that of a bundle's code tells its figures as claims."""
    return {name: data for name, data in files_of(folder).items() if name != "README.md"}


def size_of(folder: Path) -> int:
    """Return the bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def blob_of(fleet: Fleet, digest: str) -> Path:
    """Return the file of a blob."""
    (path,) = (fleet.path / "blobs").rglob(str(digest))
    return path


def has_blob(fleet: Fleet, digest: str) -> bool:
    """Say whether the store has the bytes of a digest."""
    return any((fleet.path / "blobs").rglob(str(digest)))


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def is_sound(fleet: Fleet) -> bool:
    """Say whether the store has every byte that its manifests promise."""
    return not [finding for finding in fleet.verify(read_data=True) if finding.is_problem]


def code_blobs(fleet: Fleet) -> dict[str, str]:
    """Return the digest of the current code by task."""
    return {name: str(task.code.blob) for name, task in tasks_in(fleet).items() if task.code is not None}


def tasks_in(fleet: Fleet) -> dict[str, Task]:
    """Return all tasks of a fleet by name."""
    with Store.open(fleet.path, read_only=True) as store:
        return {task.name: task for task in store.tasks()}


def generators_in(fleet: Fleet) -> list[Generator]:
    """Return the generators of a fleet, oldest first."""
    with Store.open(fleet.path, read_only=True) as store:
        return store.generators()


def stop_after(count: int, kind: type[Event] = Event) -> Listener:
    """Return a listener that stops the work at an event of a kind: 1 is the first."""
    heard = 0

    def listen(event: Event) -> None:
        nonlocal heard
        heard += isinstance(event, kind)
        if heard == count:
            raise Cancelled

    return listen


def equal(one: Adapter, other: Adapter) -> bool:
    """Say whether two adapters have the same numbers in the same modules."""
    pairs = list(zip(one.modules, other.modules, strict=True))
    return all(x.name == y.name and torch.equal(x.a, y.a) and torch.equal(x.b, y.b) for x, y in pairs)


def copy_of(store: Path, place: Path) -> Fleet:
    """Copy a store and return its fleet."""
    return Fleet(shutil.copytree(store, place))
