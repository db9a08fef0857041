"""The generators of a store: list them, roll back to an earlier one, forget one that is not needed any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, use_case
from registry.errors import DamagedStore
from registry.records import GeneratorRecord

if TYPE_CHECKING:
    from registry.store import Store

_FEWEST_DIGITS = 4  # of a digest, to name a generator


@dataclass(frozen=True)
class GeneratorVersion:
    """A generator of the store."""

    record: GeneratorRecord
    tasks: Sequence[str]
    last_copies: Sequence[str]
    networks: int | None  # how many versions of the network its file holds; None if the file cannot be read


@dataclass(frozen=True)
class RolledBack:
    """The generator that is current now, and the tasks that had a code before and have none under it."""

    generator: GeneratorRecord
    without_code: list[str]


@dataclass(frozen=True)
class Forgotten:
    """A generator that was forgotten, or would be, and how many codes go with it."""

    generator: GeneratorRecord
    codes: int


@use_case
def list_generators(context: Context) -> list[GeneratorVersion]:
    """List all generators by base model, oldest first, with what depends on each."""
    with context.open(read_only=True) as store:
        return [
            GeneratorVersion(use.generator, use.tasks, use.last_copies, _networks(store, use.generator))
            for use in store.generators.uses()
        ]


@use_case
def rollback(context: Context, digest: str) -> RolledBack:
    """Make another generator of the same base model the current one; nothing is deleted.

    Args:
        context: The store.
        digest: The first digits of the generator's digest, four or more.

    Raises:
        DataError: No generator, or more than one, begins with these digits.
        LastCopy: An evicted task could not be restored as it was checked; nothing changed.
    """
    with context.open() as store:
        generator = _find(store, digest)
        # An update in progress would lose its work: the generator that it continues must be current when it is done.
        with store.job(generator.base_model):
            generator = _find(store, digest)  # again: it may have been forgotten while this waited
            return RolledBack(generator, store.generators.make_current(generator.id))


@use_case
def forget_generator(context: Context, generator: str | GeneratorRecord, *, dry_run: bool = False) -> Forgotten:
    """Forget a generator that is not in use, with its codes and their measurements; `prune` deletes its files.

    Args:
        context: The store.
        generator: The first digits of its digest, four or more, or its record from `generators`.
        dry_run: Only return what would be forgotten.

    Raises:
        DataError: No generator, or more than one, begins with these digits.
        GeneratorConflict: It is in use; nothing changed.
        LastCopy: It holds the only code of an evicted task; nothing changed.
    """
    with context.open(read_only=dry_run) as store:
        record = _find(store, generator) if isinstance(generator, str) else generator
        work = store.generators.check_forgettable if dry_run else store.generators.forget
        return Forgotten(record, work(record))


def _find(store: Store, digits: str) -> GeneratorRecord:
    """Find a generator by the beginning of its digest; of several with the same file the newest not in use."""
    hint = "run `icm generators` to list them"
    if len(digits) < _FEWEST_DIGITS:
        raise DataError(f"{digits!r} is too short: use at least {_FEWEST_DIGITS} digits", hint=hint)
    found = [record for record in store.generators.all() if record.blob.startswith(digits.lower())]
    if not found:
        raise DataError(f"no generator begins with {digits!r}", hint=hint)
    if len({record.blob for record in found}) > 1:
        raise DataError(f"{len(found)} generators begin with {digits!r}: use more digits", hint=hint)
    return max(found, key=lambda record: (not record.is_current, record.version))


def _networks(store: Store, generator: GeneratorRecord) -> int | None:
    from icmlora.generator.file import versions_of

    try:
        return len(versions_of(store.blobs.read(generator.blob)))
    except (DamagedStore, IcmLoraError):
        return None
