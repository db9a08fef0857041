"""List, show and remove tasks. Imports neither torch nor, for a listing, numpy."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.errors import IcmLoraError
from icmlora.fleet.context import Context, check_base_model
from registry.errors import DamagedStore
from registry.records import (
    AdapterRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    TaskRecord,
    TaskSummary,
    VectorRecord,
)

if TYPE_CHECKING:
    from icmlora.generator.initial_a.draw import InitialA
    from icmlora.task_vectors.distances import Neighbour
    from registry.store import Store


@dataclass(frozen=True)
class TaskDetails:
    """Everything that the store knows about a task."""

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
        """The final adapter of the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


@dataclass(frozen=True)
class Removal:
    """What is deleted with a task."""

    name: str
    adapters: int
    size: int  # bytes of their files; other tasks may share some of them
    is_last_copy: bool  # whether its original was evicted, so that its code is the only copy


def list_tasks(context: Context, base_model: str | None = None) -> list[TaskSummary]:
    """Return all tasks by name, or those of one base model."""
    with context.open(read_only=True) as store:
        rows = list(store.tasks.summaries())
    check_base_model(base_model, {row.task.base_model for row in rows})
    return [row for row in rows if base_model in (None, row.task.base_model)]


def show_task(context: Context, name: str) -> TaskDetails:
    """Return everything about one task."""
    from icmlora.fleet.map import nearest_tasks

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


def plan_removal(context: Context, names: Sequence[str]) -> list[Removal]:
    """Return what would be deleted with some tasks, each task once."""
    with context.open(read_only=True) as store:
        tasks = {store.tasks.get(name).name: None for name in names}
        return [_removal(name, store.tasks.adapters(name)) for name in tasks]


def remove_tasks(context: Context, names: Sequence[str], *, last_copies: Collection[str] = ()) -> list[str]:
    """Remove tasks and return their names; pruning frees their bytes."""
    with context.open() as store:
        return [task.name for task in store.tasks.remove(names, last_copies=last_copies)]


def _initial(store: Store, generator: GeneratorRecord, code: CodeRecord) -> InitialA | None:
    """Read the initialisation seed from a code; None if a file is damaged, which `icm verify` reports."""
    from icmlora.generator.code import Code, generator_of
    from icmlora.generator.file import versions_of

    try:
        data, versions = store.blobs.read(code.blob), versions_of(store.blobs.read(generator.blob))
        config = next((version.config for version in versions if version.digest == generator_of(data)), None)
        return None if config is None else Code.from_bytes(data, config).head.initial
    except (DamagedStore, IcmLoraError):
        return None


def _removal(name: str, adapters: Sequence[AdapterRecord]) -> Removal:
    size = sum(adapter.stored_bytes for adapter in adapters)
    return Removal(name, len(adapters), size, any(adapter.is_final and adapter.is_evicted for adapter in adapters))
