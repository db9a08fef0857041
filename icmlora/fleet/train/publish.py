"""Publish new codes and the generator that decodes them, in one transaction.

A task that another process changed during the training is read again: its code is published if it still has the adapter
that was encoded. Tasks that were added since are not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from icmlora.fleet.resources.task_code import replaced_bytes, with_code
from registry.errors import DamagedStore, LostRace
from registry.filters import Selection
from registry.manifests import Code, CodeLimits, File, Generator, Task

if TYPE_CHECKING:
    from icmlora.fleet.resources.adapter_source import StoreAdapterSource
    from icmlora.generator.codec.encoding import Encoded
    from registry.store import Store

REPLACED = "its adapter was replaced during training"
EVICTED = "its original was evicted during training"


@dataclass(frozen=True)
class Published:
    """A generator with the codes that were published."""

    generator: Generator
    before: Generator | None  # the generator that was in use
    codes: Mapping[str, Encoded]  # by the present names of their tasks
    left_out: dict[str, str]  # encoded tasks that another process changed, and how
    replaced_bytes: int  # of codes and networks that no code needs any more


def put_files(store: Store, items: Sequence[bytes]) -> list[File]:
    """Store blobs and return references to them."""
    return [File(blob, len(data)) for blob, data in zip(store.blobs.put_all(items), items, strict=True)]


def publish(
    store: Store,
    source: StoreAdapterSource,
    generator: Generator,
    codes: Mapping[str, Encoded],
    asked: CodeLimits,
    *,
    decodes: frozenset[str] = frozenset(),
    ends_run: bool = True,
) -> Published:
    """Publish codes of tasks of a source.

    Args:
        store: The store.
        source: The tasks as they were encoded.
        generator: Decodes the codes: the one in use as it was read, or a new one, which gets the next version.
        codes: The codes by task.
        asked: The limits that they were made for.
        decodes: Digests of networks that a new generator continues. It decodes their codes to the same adapters, so all
            tasks with such codes get it, evicted ones included.
        ends_run: Whether the training run of the base model made them, so that it is over.
    """
    files = put_files(store, [code.data for code in codes.values()])
    made = {
        name: Code(blob=file, generator=generator.blob, squared_error=code.squared_error, asked=asked)
        for (name, code), file in zip(codes.items(), files, strict=True)
    }
    seen = [task for task in map(source.task, range(source.tasks())) if task.name in made]
    while True:
        before = store.generator(source.base_model)
        new = [] if generator.manifest is not None else [_next(generator, before)]
        present, left_out = _present(store, seen)
        coded = [with_code(task, made[name]) for name, task in present.items()]
        names = {task.name for task in coded}
        rows = [row for row in store.rows(Selection(base_model=source.base_model)) if row.name not in names]
        continued = [task for row in rows if row.generator in decodes and (task := _read(store, row.name)) is not None]
        moved = [_moved(task, generator.blob, decodes) for task in continued]
        states = [*new, *coded, *moved]
        try:
            stored = store.end_run(source.base_model, states) if ends_run else store.publish(states) if states else []
        except LostRace:
            continue
        earlier = [task.code for task in (*present.values(), *continued)]
        used = {str(row.generator) for row in rows if row.generator not in decodes}
        return Published(
            cast(Generator, stored[0]) if new else generator,
            before,
            {present[name].name: codes[name] for name in present},
            left_out,
            replaced_bytes(earlier, [task.code for task in (*coded, *moved)], used),
        )


def _next(generator: Generator, before: Generator | None) -> Generator:
    if before is None:
        return generator
    return replace(generator, version=before.version + 1, seq=before.seq, manifest=before.manifest)


def _present(store: Store, seen: Sequence[Task]) -> tuple[dict[str, Task], dict[str, str]]:
    """Return the present state of tasks by their former names, and why others must not get the code."""
    rows = {row.name.lower(): row for row in store.rows_of(names=[task.name for task in seen])}
    taken = {task.name.lower() for task in seen}
    present, left_out = dict[str, Task](), dict[str, str]()
    for task in seen:
        row = rows.get(task.name.lower())
        now = task if row is not None and row.manifest == task.manifest else _read_again(store, task, taken)
        if now is None:
            left_out[task.name] = REPLACED
        elif now.final.is_evicted:
            left_out[task.name] = EVICTED
        else:
            present[task.name] = now
            taken.add(now.name.lower())
    return present, left_out


def _read_again(store: Store, task: Task, taken: Collection[str]) -> Task | None:
    """Return a task that was changed or renamed; None if it has another adapter."""
    same = store.rows_of(weights=[task.final.weights])
    for name in (task.name, *(row.name for row in same if row.name.lower() not in taken)):
        now = _read(store, name)
        if now is not None and now.base_model == task.base_model and now.final.is_same(task.final):
            return now
    return None


def _read(store: Store, name: str) -> Task | None:
    with suppress(DamagedStore):  # it keeps its state
        return store.find(name)
    return None


def _moved(task: Task, network: File, decodes: Collection[str]) -> Task:
    """Return a task with its code and measurements under a network that continues their present one."""
    if task.code is None or task.code.generator not in decodes:
        return task
    before = task.code.generator
    measured = tuple(replace(one, generator=str(network)) if one.generator == before else one for one in task.measured)
    return replace(task, code=replace(task.code, generator=network), measured=measured)
