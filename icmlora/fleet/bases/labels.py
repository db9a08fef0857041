"""Join labels of base models, and separate them again: tasks of joined labels share one generator.

Tasks and generators move to the other name in one publication. Codes name their generator, so they stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from registry.errors import BaseModelConflict, LostRace
from registry.filters import Selection
from registry.manifests import BaseLabel, BaseRecord, Generator, JoinReason, State, Task
from registry.names import UNKNOWN_BASE

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Joined:
    """What joining labels to a base model did."""

    name: str  # of the base model
    labels: tuple[str, ...] = ()  # that are new to it
    tasks: int = 0  # that came with them
    generators: int = 0  # versions that came with them
    without_code: tuple[str, ...] = ()  # tasks whose code is of a generator that is not in use any more


@dataclass(frozen=True)
class Separated:
    """What separating a label from its base model did."""

    label: str
    tasks: int  # that went with it
    generators: int  # versions that went with it, because no task stayed
    codes: int  # that were deleted, because their generator stayed


@dataclass
class _Change:
    """States to publish and to remove together."""

    new: list[State] = field(default_factory=list)
    gone: list[State] = field(default_factory=list)


def join(
    store: Store, name: str, labels: Sequence[str], *, reason: JoinReason = "told", keep: str | None = None
) -> Joined:
    """Give a base model more labels, with the tasks and generators of those that are base models of their own.

    Args:
        store: The store.
        name: Any label of the base model; it need not be in the store.
        labels: Its further names.
        reason: How it is known that they are the same model.
        keep: If several have a generator, a label of the one whose generator stays in use.

    Raises:
        BaseModelConflict: A label belongs to another base model, or several have a generator and `keep` is not given.
    """
    bases = sorted({store.base_name(label) for label in (name, *labels)})
    with ExitStack() as jobs:
        for base in bases:  # always in the same order, so that two commands do not wait for each other
            jobs.enter_context(store.job(base))
        while True:
            joined, change = _joined(store, name, labels, reason, keep)
            try:
                if change.new:
                    store.publish(change.new, remove=change.gone)
            except LostRace:
                continue
            return joined


def _joined(
    store: Store, name: str, labels: Sequence[str], reason: JoinReason, keep: str | None
) -> tuple[Joined, _Change]:
    base, change = store.base_model(name), _Change()
    added: list[str] = []
    tasks: list[Task] = []
    moved = list[Generator]()
    current, used = store.generator(base.name), store.generator(base.name)
    for label in dict.fromkeys(labels):
        other = store.base_model(label)
        if UNKNOWN_BASE in (label, base.name):
            fact = f"{UNKNOWN_BASE!r} groups the adapters without a base model, so it cannot be joined"
            raise BaseModelConflict(fact, hint="specify their base model with `icm ingest --base-model NAME`")
        if label in base.names:
            continue
        if other.name != label:
            hint = f"join {other.name} instead, or run `icm base alias {other.name} {label} --remove` first"
            raise BaseModelConflict(f"{label!r} is a label of {other.name!r}", hint=hint)
        new = (BaseLabel(label=label, reason=reason), *other.labels)
        base = replace(base, labels=tuple(sorted((*base.labels, *new), key=lambda one: one.label)))
        if base.fingerprint is None:
            base = replace(base, fingerprint=other.fingerprint, shape=other.shape)
        added.append(label)
        tasks += (
            replace(task, base_model=base.name, label=task.label or label)
            for task in store.tasks(Selection(base_model=label))
        )
        theirs = store.generator(label)
        if theirs is not None:
            used = _chosen(base, other, used, theirs, keep)
            moved += store.generators(label)
        # A stopped training does not go on: it read the tasks of one of the two only.
        change.gone += filter(None, (theirs, store.run(label), other if other.manifest else None))
    if added:
        change.new = [base, *tasks, *renumbered(store, base.name, moved, current, used)]
    lost = [task.name for task in _with_codes(store, base, tasks) if used is None or task.code_under(used) is None]
    return Joined(base.name, tuple(added), len(tasks), len(moved), tuple(sorted(lost)) if moved else ()), change


def _chosen(
    base: BaseRecord, other: BaseRecord, mine: Generator | None, theirs: Generator, keep: str | None
) -> Generator:
    """Return which of two generators stays in use."""
    if mine is None:
        return theirs
    if keep is None:
        fact = f"{base.name!r} and {other.name!r} both have a generator"
        hint = "choose the one to use with --keep NAME, then run `icm train --update` to encode the tasks of the other"
        raise BaseModelConflict(fact, hint=hint)
    if keep not in (*base.names, *other.names):
        fact = f"{keep!r} is neither {base.name!r} nor {other.name!r}"
        raise BaseModelConflict(fact, hint="use --keep with the name of one of the two")
    return theirs if keep in other.names else mine


def renumbered(
    store: Store, base: str, moved: Sequence[Generator], current: Generator | None, used: Generator | None
) -> list[Generator]:
    """Return generators under the numbers that follow those of a base model, the one in use last."""
    if not moved or used is None:
        return []
    latest = max((one.version for one in store.generators(base)), default=0)
    order = [*(one for one in moved if one.blob != used.blob), used]
    numbered = [
        replace(one, base_model=base, version=latest + place, manifest=None) for place, one in enumerate(order, 1)
    ]
    return [*numbered[:-1], replace(numbered[-1], manifest=None if current is None else current.manifest)]


def _with_codes(store: Store, base: BaseRecord, tasks: Sequence[Task]) -> list[Task]:
    return [task for task in (*store.tasks(Selection(base_model=base.name)), *tasks) if task.code is not None]


def separate(store: Store, label: str) -> Separated:
    """Make a label a base model of its own again, with the tasks whose adapters name it.

    If no task stays, the generators go with the label. Otherwise the tasks lose vectors, measurements and codes, which
    may have been made with another model; a task without its original keeps its code.

    Raises:
        BaseModelConflict: The label is not joined to a base model.
    """
    with store.job(store.base_name(label)):
        while True:
            separated, change = _separated(store, label)
            try:
                store.publish(change.new, remove=change.gone)
            except LostRace:
                continue
            return separated


def _separated(store: Store, label: str) -> tuple[Separated, _Change]:
    old = store.base_model(label)
    if label == old.name or label not in old.names:
        fact = f"{label!r} is not a label of any base model"
        raise BaseModelConflict(fact, hint="run `icm base ls` to list all labels")
    change = _Change([replace(old, labels=tuple(one for one in old.labels if one.label != label))])
    tasks = list(store.tasks(Selection(base_model=old.name)))
    leaving = [replace(task, base_model=label, label=None) for task in tasks if task.label == label]
    generators, codes = list[Generator](), 0
    if leaving and len(leaving) == len(tasks):
        current = store.generator(old.name)
        if current is not None:
            generators = renumbered(store, label, store.generators(old.name), None, current)
            change.gone += filter(None, (current, store.run(old.name)))
    else:
        codes = sum(task.code is not None and not task.final.is_evicted for task in leaving)
        leaving = [
            replace(task, vectors=(), measured=(), code=task.code if task.final.is_evicted else None)
            for task in leaving
        ]
    change.new += [*leaving, *generators]
    return Separated(label, len(leaving), len(generators), codes), change
