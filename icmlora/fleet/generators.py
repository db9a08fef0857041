"""The generators of a store: what depends on each, which one is in use, and which are not needed any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context
from registry.errors import DamagedStore
from registry.records import GeneratorRecord

if TYPE_CHECKING:
    from registry.generators import GeneratorUse
    from registry.store import Store

SHORTEST = 4
"""Hexadecimal digits that a generator has to be named by."""


@dataclass(frozen=True)
class Version:
    """A generator as a listing shows it; `epochs` is None where its file is damaged."""

    use: GeneratorUse
    epochs: int | None


@dataclass(frozen=True)
class Switched:
    """Which generator is current now, and the tasks that have no code under it but had one before."""

    generator: GeneratorRecord
    without_code: list[str]


@dataclass(frozen=True)
class Forgotten:
    """A generator that was forgotten, or would be, and how many codes go with it."""

    generator: GeneratorRecord
    codes: int


def versions(context: Context) -> list[Version]:
    """Return all generators by base model, oldest first. Reads their files, and no code."""
    with context.open(read_only=True) as store:
        return [Version(use, _epochs(store, use.generator)) for use in store.generators.uses()]


def roll_back(context: Context, name: str) -> Switched:
    """Make another generator the current one of its base model; the present one stays in the store.

    Raises:
        DataError: No generator, or several, begin with that name.
        LastCopy: It does not have the codes that stand in for evicted tasks; nothing was changed.
    """
    with context.open() as store:
        generator = _named(store, name)
        return Switched(generator, store.generators.make_current(generator.id))


def plan_forgetting(context: Context, name: str) -> Forgotten:
    """Say what forgetting a generator would take away.

    Raises:
        DataError: No generator, or several, begin with that name.
        GeneratorConflict, LastCopy: As `forget`.
    """
    with context.open(read_only=True) as store:
        generator = _named(store, name)
        return Forgotten(generator, store.generators.check_forgettable(generator))


def forget(context: Context, generator: GeneratorRecord) -> None:
    """Forget a generator with its codes; `icm prune` frees the bytes that nothing else needs.

    Raises:
        GeneratorConflict: It is the current one; nothing was changed.
        LastCopy: It holds the only code of an evicted task; nothing was changed.
        GeneratorNotFound: Another process was faster, and another generator may have its number by now; likewise.
    """
    with context.open() as store:
        store.generators.forget(generator)


def _named(store: Store, name: str) -> GeneratorRecord:
    """Find a generator by the beginning of its digest; of several with one file the newest that is not current."""
    found = [record for record in store.generators.all() if record.blob.startswith(name.lower())]
    hint = "`icm generators` lists them"
    if not found or len(name) < SHORTEST:
        fact = f"no generator begins with {name!r}"
        raise DataError(fact if len(name) >= SHORTEST else f"{name!r} is too short: give {SHORTEST} digits", hint=hint)
    if len({record.blob for record in found}) > 1:
        raise DataError(f"{len(found)} generators begin with {name!r}: give more digits", hint=hint)
    return max(found, key=lambda record: (not record.is_current, record.version))


def _epochs(store: Store, generator: GeneratorRecord) -> int | None:
    from icmlora.generator.file import versions_of

    try:
        return len(versions_of(store.blobs.read(generator.blob)))
    except (DamagedStore, IcmLoraError):
        return None
