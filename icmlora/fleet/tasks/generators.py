"""The generators of a store: list them, and make an earlier one current again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from icmlora.errors import DataError, IcmLoraError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import Param
from registry.errors import DamagedStore
from registry.manifests import Generator, Task

if TYPE_CHECKING:
    from registry.store import Store

_MIN_DIGITS = 4  # of a digest, to name a generator


@dataclass(frozen=True)
class GeneratorVersion:
    """A version of the generator of a base model."""

    generator: Generator
    is_current: bool  # new codes are made with it
    tasks: Sequence[str]  # their codes need it; `NAME@2` for an earlier version of a task
    networks: int | None  # how many versions of the network its file holds; None if the file cannot be read


@dataclass(frozen=True)
class RolledBack:
    """The generator that makes new codes now, and the tasks whose codes need another one, which stays."""

    generator: Generator
    others: Sequence[str]


@use_case
def list_generators(context: Context) -> list[GeneratorVersion]:
    """List generators and the tasks that need them.

    The generator in use makes new codes. A code always needs the generator it was made with, so older generators stay
    as long as a task, or an earlier version of one, needs them. `icm prune` deletes the others.

    NETWORKS counts the versions of the network in the file, because `icm train --update` may add one. FEW-SHOT START is
    the size of the data for `icm generate`.

    Example:
      icm generators
    """
    with context.open(read_only=True) as store:
        generators, tasks = store.generators(), _tasks_of(store)
        current = {one.base_model: one.version for one in generators}
        return [
            GeneratorVersion(one, one.version == current[one.base_model], tasks[one.blob], _networks(store, one))
            for one in generators
        ]


@use_case
def rollback(
    context: Context,
    digest: Annotated[str, Param("First digits of a generator's digest, as listed by `icm generators`.", "DIGEST")],
) -> RolledBack:
    """Make new codes with an earlier generator.

    Its network becomes the next version of the generator. Existing codes keep the generator they were made with, so no
    adapter changes. `icm encode` encodes tasks again with the generator in use.

    Example:
      icm generators rollback 3f9a12c4

    Raises:
        DataError: No generator, or more than one, begins with these digits.
        DamagedStore: Its file is missing or damaged; nothing changed.
    """
    # A running training publishes a continuation of the current generator, so wait for it.
    with context.open() as store, store.job(_find(store, digest).base_model):
        found = _find(store, digest)  # `icm prune` may have deleted it
        store.blobs.check(found.blob)
        if found.start is not None:
            store.blobs.check(found.start)

        def following(current: Generator | None) -> Generator:
            if current is None or current.blob == found.blob:
                return current or found
            return replace(found, version=current.version + 1, seq=current.seq, manifest=current.manifest)

        generator = store.update_generator(found.base_model, following)
        needing = set(_tasks_of(store)[generator.blob])
        coded = [row.name for row in store.rows() if row.base == found.base_model and row.is_coded]
        return RolledBack(generator, [name for name in coded if name not in needing])


def _find(store: Store, digits: str) -> Generator:
    """Find a generator by the beginning of its digest; of several with the same network the newest."""
    hint = "run `icm generators` to list them"
    if len(digits) < _MIN_DIGITS:
        raise DataError(f"{digits!r} is too short: use at least {_MIN_DIGITS} digits", hint=hint)
    found = [one for one in store.generators() if one.blob.startswith(digits.lower())]
    if not found:
        raise DataError(f"no generator begins with {digits!r}", hint=hint)
    if len({one.blob for one in found}) > 1:
        raise DataError(f"{len(found)} generators begin with {digits!r}: use more digits", hint=hint)
    return max(found, key=lambda one: one.version)


def _tasks_of(store: Store) -> defaultdict[str, list[str]]:
    """Return digest of a network -> the tasks and earlier versions whose codes need it."""
    from registry.reachability import manifests_of  # imports SQLAlchemy

    current = {row.name.lower(): row.version for row in store.rows()}
    tasks = defaultdict[str, list[str]](list)
    for (_, key), body in manifests_of(store, Task.KIND):
        if "code" in body:
            name, version = body["name"], body.get("version", 1)
            digest = body["code"]["generator"].partition(":")[0]
            tasks[digest].append(name if version == current.get(key) else f"{name}@{version}")
    return tasks


def _networks(store: Store, generator: Generator) -> int | None:
    from icmlora.generator.files.file import versions_of

    try:
        return len(versions_of(store.blobs.read(generator.blob)))
    except (DamagedStore, IcmLoraError):
        return None
