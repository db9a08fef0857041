"""What is in the store: names, and the list of tasks. Never imports torch.

Which base models the store knows, and where they are on this machine.

Look for damage in the store, and move damaged bytes out of the way.

Forget tasks, and free the bytes that nothing needs any more.

What `icm doctor` finds out about the machine and the store.

The generators of a store: what depends on each, which one is in use, and which are not needed any more.

Everything about one task. Never imports torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.lookup import find_base_model, inspect_base
from icmlora.errors import BaseModelNotFound, DataError, IcmLoraError
from icmlora.fleet.context import Context, check_base_model
from icmlora.fleet.map import nearest_tasks
from icmlora.generator.code import Code, generator_of
from icmlora.generator.file import versions_of
from icmlora.generator.initial_a.draw import InitialA
from icmlora.task_vectors.distances import Neighbour
from registry.errors import DamagedStore
from registry.generators import GeneratorUse
from registry.prune import PruneReport
from registry.records import (
    AdapterRecord,
    BaseModelRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    TaskRecord,
    TaskSummary,
    VectorRecord,
)
from registry.verify import Finding

if TYPE_CHECKING:
    from registry.store import Store


def task_names(context: Context) -> list[str]:
    """Return the names of all tasks."""
    with context.open(read_only=True) as store:
        return [task.name for task in store.tasks.all()]


def base_names(context: Context) -> list[str]:
    """Return the names of all base models."""
    with context.open(read_only=True) as store:
        return [base.name for base in store.base_models.all()]


def list_tasks(context: Context, base_model: str | None = None) -> list[TaskSummary]:
    """Return all tasks by name, or those of one base model.

    Raises:
        DataError: No task belongs to the base model.
    """
    with context.open(read_only=True) as store:
        rows = list(store.tasks.summaries())
    check_base_model(base_model, {row.task.base_model for row in rows})
    return [row for row in rows if base_model in (None, row.task.base_model)]


@dataclass(frozen=True)
class KnownBase:
    """A base model of the store.

    Attributes:
        record: What the store has.
        path: Where a local copy is, or None.
        problem: Why there is none, or None.
    """

    record: BaseModelRecord
    path: Path | None
    problem: str | None


def known_bases(context: Context) -> list[KnownBase]:
    """Return the base models that adapters name or that were added, and where each one is."""
    with context.open(read_only=True) as store:
        return [_locate(record) for record in store.base_models.all()]


def add_base(context: Context, name: str, path: Path) -> Path:
    """Record where a base model is; the store is made if there is none.

    Raises:
        BaseModelNotFound: There is no base model that could be loaded.
    """
    found = inspect_base(name, path.expanduser().absolute())
    with context.open(create=True) as store:
        store.base_models.set_path(name, str(found.path))
    return found.path


def forget_base(context: Context, name: str) -> None:
    """Forget where a base model is; its adapters stay.

    Raises:
        BaseModelNotFound: The store does not know the name.
    """
    with context.open() as store:
        if name not in {record.name for record in store.base_models.all()}:
            raise BaseModelNotFound(f"no base model is called {name!r}", hint="`icm base ls` lists them")
        store.base_models.set_path(name, None)


def _locate(record: BaseModelRecord) -> KnownBase:
    aliases = {} if record.path is None else {record.name: record.path}
    try:
        return KnownBase(record, find_base_model(record.name, aliases=aliases).path, None)
    except BaseModelNotFound as error:
        return KnownBase(record, None, str(error))


def find_damage(context: Context, *, names: Sequence[str], read_data: bool) -> Iterator[Finding]:
    """Yield what is wrong, as it is found.

    Args:
        context: The store.
        names: Only what these tasks need; everything if empty.
        read_data: Hash every blob, not only look at its length.

    Raises:
        TaskNotFound: A name is not in the store.
    """
    with context.open(read_only=True) as store:
        yield from store.verify(read_data=read_data, names=names)


def quarantine_damage(context: Context) -> list[tuple[Finding, Path]]:
    """Move every blob with wrong bytes to quarantine and return each with its new place."""
    with context.open() as store:
        return store.repair()


@dataclass(frozen=True)
class Doomed:
    """A task that is to be forgotten.

    Attributes:
        name: The task, as the store spells it.
        adapters: How many adapters it has.
        size: Bytes of their files; some may be shared with other tasks.
        is_last_copy: Whether its original was evicted, so that its code is all there is.
    """

    name: str
    adapters: int
    size: int
    is_last_copy: bool


def plan_removal(context: Context, names: Sequence[str]) -> list[Doomed]:
    """Return what forgetting some tasks would take away, each task once.

    Raises:
        TaskNotFound: One of them is not in the store.
    """
    with context.open(read_only=True) as store:
        tasks = {store.tasks.get(name).name: None for name in names}
        return [_doomed(name, store.tasks.adapters(name)) for name in tasks]


def remove_tasks(context: Context, names: Sequence[str], *, last_copies: Collection[str] = ()) -> list[str]:
    """Forget tasks and return their names; `prune_store` frees their bytes.

    Args:
        context: The store.
        names: The tasks.
        last_copies: Those of which the user knows that nothing brings them back.

    Raises:
        TaskNotFound: One of them is not there any more; nothing was changed.
        LastCopy: Another one was evicted meanwhile; nothing was changed.
    """
    with context.open() as store:
        return [task.name for task in store.tasks.remove(names, last_copies=last_copies)]


def prune_store(context: Context, *, grace: float, dry_run: bool) -> PruneReport:
    """Delete the bytes that no row needs.

    Args:
        context: The store.
        grace: Seconds; what is younger stays.
        dry_run: Only say what would go.
    """
    with context.open(read_only=dry_run) as store:
        return store.prune(grace=grace, dry_run=dry_run)


def _doomed(name: str, adapters: Sequence[AdapterRecord]) -> Doomed:
    size = sum(adapter.stored_bytes for adapter in adapters)
    return Doomed(name, len(adapters), size, any(adapter.is_final and adapter.is_evicted for adapter in adapters))


_DISTRIBUTIONS = ("icm-lora", "torch", "transformers", "peft", "safetensors", "sqlalchemy", "numpy", "typer")
_LOW_SPACE = 1 << 30  # bytes: less than this does not hold a handful of adapters and a generator


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at, as a JSON key.
        value: What was found.
        problem: What is wrong with it, or None.
    """

    name: str
    value: str | int | None
    problem: str | None = None


def examine(context: Context) -> list[Check]:
    """Look at versions, devices and the store, which is opened to be read, as other commands open it."""
    return [*_versions(), *_devices(), *_database_library(), *_store(context)]


def _versions() -> list[Check]:
    found = [Check("python", platform.python_version()), Check("platform", platform.platform())]
    for name in _DISTRIBUTIONS:
        try:
            found.append(Check(name, version(name)))
        except PackageNotFoundError:
            found.append(Check(name, None, "not installed"))
    return found


def _devices() -> list[Check]:
    import torch

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [
        Check("cpu_threads", torch.get_num_threads()),
        Check("cuda", ", ".join(cuda) or "none"),
        Check("mps", "available" if torch.backends.mps.is_available() else "none"),
    ]


def _database_library() -> list[Check]:
    note = "has the WAL-reset bug, which icm avoids by using the rollback journal"
    suffix = f" ({note})" if has_wal_reset_bug(sqlite3.sqlite_version_info) else ""
    return [Check("sqlite", f"{sqlite3.sqlite_version}{suffix}")]


def has_wal_reset_bug(release: tuple[int, ...]) -> bool:
    """Say whether an SQLite release can corrupt a WAL database: 3.7.0 to 3.51.2, but for two backports of the fix."""
    if (3, 44, 6) <= release < (3, 45) or (3, 50, 7) <= release < (3, 51):
        return False
    return (3, 7, 0) <= release < (3, 51, 3)


def _store(context: Context) -> list[Check]:
    store = context.path
    anchor = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    free = shutil.disk_usage(anchor).free
    checks = [Check("free_bytes", free, "less than 1 GiB is free" if free < _LOW_SPACE else None)]
    if not os.access(anchor, os.W_OK | os.X_OK):
        checks.append(Check("writable", "no", f"{anchor} cannot be written by this user"))
    if not (store / "FORMAT").exists():
        return [*checks, Check("store", "none yet; `icm ingest` makes it")]
    return [*checks, _opened(context), _schema(store / "registry.db")]


def _opened(context: Context) -> Check:
    """Open the store: what another command would refuse to work with is a problem, in the same words."""
    from registry.errors import RegistryError

    problem = None
    try:
        with context.open(read_only=True):
            pass
    except RegistryError as error:
        problem = str(error) if error.hint is None else f"{error}; {error.hint}"
    try:
        format_ = (context.path / "FORMAT").read_text(errors="replace").strip()[:80]
    except OSError:
        format_ = None
    return Check("store", format_, problem)


def _schema(database: Path) -> Check:
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        return Check("schema", None, f"the database cannot be read: {error}")
    return Check("schema", schema, None if verdict == "ok" else f"the database is damaged: {verdict}")


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
    try:
        return len(versions_of(store.blobs.read(generator.blob)))
    except (DamagedStore, IcmLoraError):
        return None


@dataclass(frozen=True)
class TaskDetails:
    """Everything that the store knows of a task.

    Attributes:
        adapters: Checkpoints by step, the final adapter last.
        nearest: The nearest tasks by their vectors, at most five; none without vectors, or with too few to compare.
        generator: The current generator of its base model, if there is one.
        code: Its code under that generator, if it has one.
        initial: Where the A that its training began with was drawn, if the code knows.
        evaluations: All measurements, latest of each kind.
    """

    task: TaskRecord
    adapters: tuple[AdapterRecord, ...]
    vectors: tuple[VectorRecord, ...]
    nearest: tuple[Neighbour, ...]
    generator: GeneratorRecord | None
    code: CodeRecord | None
    initial: InitialA | None
    evaluations: tuple[EvaluationRecord, ...]

    @property
    def final(self) -> AdapterRecord:
        """The adapter that stands for the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


def describe_task(context: Context, name: str) -> TaskDetails:
    """Return everything about one task.

    Raises:
        TaskNotFound: There is no such task; the error names the closest ones.
    """
    with context.open(read_only=True) as store:
        task = store.tasks.get(name)
        generator = store.generators.current(task.base_model)
        code = None if generator is None else store.codes.get(task.name, generator.id)
        vectors = tuple(store.vectors.all(task.name))
        return TaskDetails(
            task=task,
            adapters=tuple(store.tasks.adapters(task.name)),
            vectors=vectors,
            nearest=nearest_tasks(store, task) if vectors else (),
            generator=generator,
            code=code,
            initial=None if generator is None or code is None else _initial(store, generator, code),
            evaluations=tuple(store.evaluations.all(task.name)),
        )


def _initial(store: Store, generator: GeneratorRecord, code: CodeRecord) -> InitialA | None:
    """Read it from the code; where a file is damaged nothing is known, and `icm verify` says that it is damaged."""
    try:
        data, versions = store.blobs.read(code.blob), versions_of(store.blobs.read(generator.blob))
        config = next((version.config for version in versions if version.digest == generator_of(data)), None)
        return None if config is None else Code.from_bytes(data, config).head.initial
    except (DamagedStore, IcmLoraError):
        return None
