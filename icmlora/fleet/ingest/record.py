"""Decide what an ingest changes about a task, and publish it. The same ingest again changes nothing.

known task, offered task ──decide──▶ the task as it will be, and an outcome ──record──▶ one transaction
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from registry.errors import LostRace, MissingBlob, TaskConflict
from registry.manifests import Adapter, Extra, Task
from registry.names import UNKNOWN_BASE, check_name, folder_of

if TYPE_CHECKING:
    from registry.store import Store

OnConflict = Literal["version", "skip", "fail"]
Status = Literal["added", "updated", "known", "version", "skipped", "decoded"]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A task to be recorded, as it would be if the store did not know it. Its blobs are in the store."""

    # Any label may name its base model. Without samples or held-out text, a known task keeps its own.
    task: Task
    base_is_told: bool = False  # by the user, because the adapters name none: a known task without one gets it


@dataclass(frozen=True)
class Outcome:
    """The result for one offer."""

    name: str  # as the store spells it
    # `added`; `updated`; `known`; `version` (a new one); `skipped`; `decoded` (it is what the task's code decodes to)
    status: Status
    new: int  # adapters that were not in the store
    known: int
    base_model: str  # its name, whichever label the offer has
    version: int = 1
    evicted: int = 0  # known adapters that stay evicted
    restored: int = 0


_Decision = tuple[Task, Outcome]
"""A task as it will be (the known task itself, if it does not change), and the outcome."""


def record(
    store: Store | None,
    offers: Sequence[Offer],
    known: Mapping[str, Task] | None = None,
    *,
    on_conflict: OnConflict | None = None,
    restore: bool = False,
    withheld: Collection[str] = (),
    dry_run: bool = False,
) -> list[Outcome | TaskConflict]:
    """Publish offered tasks in one transaction, without those in conflict with a known task.

    Args:
        store: The store; None if it does not exist, which counts as a dry run.
        offers: Tasks with different names.
        known: Those that the store has, by name in lower case, as they were read; read now by default.
        on_conflict: What to do if a task exists with another final adapter. None adds a version if it comes from the
            same folder, and fails otherwise.
        restore: Store the weights of evicted adapters again.
        withheld: Digests of evicted weights that were not stored.
        dry_run: Return the same, and write nothing.

    Raises:
        MissingBlob: A task needs weights that were withheld.
    """
    if len({check_name(offer.task.name).lower() for offer in offers}) != len(offers):
        raise ValueError("two tasks in the batch have the same name")
    while True:
        if known is None:
            known = _known(store, offers)
        labels = {offer.task.base_model for offer in offers}
        bases = {label: label if store is None else store.base_name(label) for label in labels}
        made = [_try(offer, bases, known, on_conflict, restore=restore) for offer in offers]
        decisions = [one for one in made if not isinstance(one, TaskConflict)]
        changed = [task for task, _ in decisions if task is not known.get(task.name.lower())]
        if store is not None and changed and not dry_run:
            for task in changed:
                _check_weights(store, task, withheld)
            try:
                store.publish(changed)
            except (LostRace, TaskConflict):  # another process changed or added one of them
                known = None
                continue
        return [one if isinstance(one, TaskConflict) else one[1] for one in made]


def _known(store: Store | None, offers: Sequence[Offer]) -> dict[str, Task]:
    found = () if store is None else (store.find(offer.task.name) for offer in offers)
    return {task.name.lower(): task for task in found if task is not None}


def _try(
    offer: Offer,
    bases: Mapping[str, str],
    known: Mapping[str, Task],
    on_conflict: OnConflict | None,
    *,
    restore: bool,
) -> _Decision | TaskConflict:
    base, label = bases[offer.task.base_model], offer.task.base_model
    offered = replace(offer.task, base_model=base, label=None if label == base else label)
    present = known.get(offered.name.lower())
    if present is None:
        return _added(offered)
    try:
        return _decide(present, offered, on_conflict, restore=restore, base_is_told=offer.base_is_told)
    except TaskConflict as error:
        return error


def _added(offered: Task) -> _Decision:
    task = replace(offered, checkpoints=_unknown(offered.checkpoints, ()))
    new = len(task.adapters)
    return task, Outcome(task.name, "added", new, len(offered.adapters) - new, task.base_model)


def _decide(
    known: Task, offered: Task, on_conflict: OnConflict | None, *, restore: bool, base_is_told: bool
) -> _Decision:
    is_same = (known.final.weights, known.final.config) == (offered.final.weights, offered.final.config)
    # The label of the same adapter may mean another base model elsewhere, as a relative path does.
    if is_same and (not base_is_told or offered.base_model == known.base_model):
        return _updated(known, offered, restore=restore)
    if is_same and known.base_model == UNKNOWN_BASE:
        return _updated(known, offered, restore=restore, base_model=offered.base_model, label=offered.label)
    if on_conflict == "skip":
        return known, Outcome(known.name, "skipped", 0, 0, known.base_model, known.version)
    if on_conflict == "version" or (on_conflict is None and not is_same and _is_same_run(known, offered)):
        return _version(known, offered, restore=restore)
    if is_same:
        fact = f"task {known.name!r} belongs to base model {known.base_model!r}, not to {offered.base_model!r}"
        raise TaskConflict(known.name, fact=fact)
    raise TaskConflict(known.name)


def _is_same_run(known: Task, offered: Task) -> bool:
    """Return whether adapters of both came from the same place; the final one may be in another folder of a run."""
    places = [{one.source for one in task.adapters} | {folder_of(task.final.source)} for task in (known, offered)]
    return not places[0].isdisjoint(places[1])


def _version(known: Task, offered: Task, *, restore: bool) -> _Decision:
    """Return the next version: name, tags and note stay; code, vectors and measurements belong to the old adapter."""
    met = _met(known.checkpoints, offered.checkpoints, restore=restore)
    new = _unknown(offered.checkpoints, known.checkpoints)
    task = replace(
        known,
        version=known.version + 1,
        base_model=offered.base_model,
        label=offered.label,
        final=offered.final,
        checkpoints=_by_step((*met.values(), *new)),
        samples=offered.samples or known.samples,
        eval_data=offered.eval_data or known.eval_data,
        vectors=(),
        code=None,
        measured=(),
    )
    count = 1 + len(_unknown(offered.checkpoints, known.adapters))
    return task, _outcome(task, "version", count, offered, known.checkpoints, met)


def _updated(
    known: Task, offered: Task, *, restore: bool, base_model: str | None = None, label: str | None = None
) -> _Decision:
    # The final adapter is recognised by its bytes alone: it may have come from a checkpoint's folder.
    final = _revised(known.final, offered.final, restore=restore)
    met = _met(known.checkpoints, offered.checkpoints, restore=restore)
    checkpoints = tuple(met.get(_key(one), one) for one in known.checkpoints)
    new = _unknown(offered.checkpoints, known.adapters)
    samples = offered.samples or known.samples
    task = replace(
        known,
        base_model=base_model or known.base_model,
        label=known.label if base_model is None else label,
        final=final,
        checkpoints=_by_step((*checkpoints, *new)) if new else checkpoints,
        samples=samples,
        eval_data=offered.eval_data or known.eval_data,
        vectors=known.vectors if samples == known.samples else (),  # they are made from the samples
    )
    if task == known:
        task = known
    status: Status = "known" if task is known else "updated"
    return task, _outcome(task, status, len(new), offered, known.adapters, {**met, _key(known.final): final})


def _outcome(
    task: Task,
    status: Status,
    new: int,
    offered: Task,
    before: Sequence[Adapter],
    after: Mapping[_Key, Adapter],
) -> Outcome:
    """Return the outcome for a known task; `before` and `after` are the adapters that were offered again."""
    evicted = [_key(one) for one in before if one.is_evicted and _key(one) in after]
    left = sum(after[key].is_evicted for key in evicted)
    known = len(offered.adapters) - new
    return Outcome(task.name, status, new, known, task.base_model, task.version, left, len(evicted) - left)


def _met(known: Sequence[Adapter], offered: Sequence[Adapter], *, restore: bool) -> dict[_Key, Adapter]:
    """Return the known adapters that are offered again, as they will be."""
    again = {_key(one): one for one in offered}
    return {_key(one): _revised(one, again[_key(one)], restore=restore) for one in known if _key(one) in again}


def _revised(known: Adapter, offered: Adapter, *, restore: bool) -> Adapter:
    """Return a known adapter with its weights if they come back, its initial weights, and later extras."""
    if known.was_never_here:  # a bundle described it
        return replace(offered, created_at=known.created_at)
    extras = _extras(known.extras, offered.extras)
    is_back = known.is_evicted and restore
    if is_back or (not known.is_evicted and known.initial is None and offered.initial is not None):
        shared: dict[str, Any] = {name: getattr(offered, name) for name in Adapter.SHARED}
        learned = replace(known, initial=offered.initial, tensors_key=offered.tensors_key, evicted_at=None)
        return replace(learned, extras=extras, **shared)
    return replace(known, extras=extras)


def _extras(known: Sequence[Extra], offered: Sequence[Extra]) -> tuple[Extra, ...]:
    """Return the offered extras, which include the known ones that the store still has, and the other known files."""
    files = {extra.file for extra in offered}
    return (*offered, *(extra for extra in known if extra.file not in files))


_Key = tuple[str, str, int | None]
"""Distinguishes the checkpoints of a task: weights, configuration, step."""


def _key(adapter: Adapter) -> _Key:
    return adapter.weights, adapter.config, adapter.step


def _unknown(offered: Iterable[Adapter], known: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """Return the offered adapters that are not among those known, each once, by step."""
    seen = {_key(one) for one in known}
    return _by_step({_key(one): one for one in offered if _key(one) not in seen}.values())


def _by_step(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    return tuple(sorted(adapters, key=lambda one: -1 if one.step is None else one.step))


def _check_weights(store: Store, task: Task, withheld: Collection[str]) -> None:
    for adapter in task.adapters:
        for file in () if adapter.is_evicted else adapter.evictable:
            if file in withheld and not store.blobs.exists(file):
                raise MissingBlob(f"blob {file} is missing", hint="run the same command again")
