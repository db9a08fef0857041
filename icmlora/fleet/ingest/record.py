"""Decide what an ingest changes about a task, and publish it. The same ingest again changes nothing.

known task, offered task ──decide──▶ the task as it will be, and the result ──record──▶ one transaction
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from icmlora.fleet.ingest.report import OnConflict, TaskIngested
from registry.errors import LostRace, MissingBlob, TaskConflict
from registry.manifests import StoredAdapter, Task
from registry.names import UNKNOWN_BASE, check_name, folder_of

if TYPE_CHECKING:
    from registry.store import Store


def record(
    store: Store | None,
    offers: Sequence[Task],
    known: Mapping[str, Task] | None = None,
    *,
    on_conflict: OnConflict | None = None,
    restore: bool = False,
    named_bases: Collection[str] = (),
    withheld: Collection[str] = (),
    dry_run: bool = False,
) -> list[TaskIngested | TaskConflict]:
    """Publish offered tasks in one transaction, without those in conflict with a known task.

    Args:
        store: The store; None if it does not exist, which counts as a dry run.
        offers: Tasks with different names, as they would be if the store did not know them. Their blobs are in the
            store. Any label may name their base model. Without samples or held-out text, a known task keeps its own.
        known: Those that the store has, by name in lower case, as they were read; read now by default.
        on_conflict: What to do if a task exists with another final adapter. None adds a version if it comes from the
            same folder, and fails otherwise.
        restore: Store the weights of evicted adapters again.
        named_bases: Names of offers whose base model the user named: known tasks without a base model get it.
        withheld: Digests of evicted weights that were not stored.
        dry_run: Return the same, and write nothing.

    Raises:
        MissingBlob: A task needs weights that were withheld.
    """
    if len({check_name(offer.name).lower() for offer in offers}) != len(offers):
        raise ValueError("two tasks in the batch have the same name")
    while True:
        if known is None:
            found = () if store is None else (store.find(offer.name) for offer in offers)
            known = {task.name.lower(): task for task in found if task is not None}
        labels = {offer.base_model for offer in offers}
        bases = {label: label if store is None else store.base_name(label) for label in labels}
        results: list[TaskIngested | TaskConflict] = []
        changed: list[Task] = []
        for offer in offers:
            base, present = bases[offer.base_model], known.get(offer.name.lower())
            offered = replace(offer, base_model=base, label=None if offer.base_model == base else offer.base_model)
            try:
                task, result = _decide(present, offered, on_conflict, restore, offer.name in named_bases)
            except TaskConflict as error:
                results.append(error)
                continue
            results.append(result)
            changed += [] if task is present else [task]
        if store is not None and changed and not dry_run:
            for file in (
                file for task in changed for one in task.adapters if not one.is_evicted for file in one.evictable
            ):
                if file in withheld and not store.blobs.exists(file):
                    raise MissingBlob(f"blob {file} is missing", hint="run the same command again")
            try:
                store.publish(changed)
            except (LostRace, TaskConflict):  # another process changed or added one of them
                known = None
                continue
        return results


def _decide(
    known: Task | None, offered: Task, on_conflict: OnConflict | None, restore: bool, base_is_named: bool
) -> tuple[Task, TaskIngested]:
    """Return a task as it will be, which is the known task itself if it does not change, and the result."""
    if known is None:
        task = replace(offered, checkpoints=_unknown(offered.checkpoints, ()))
        new = len(task.adapters)
        result = TaskIngested(task.name, "added", new, len(offered.adapters) - new, base_model=task.base_model)
        return task, result
    is_same = (known.final.weights, known.final.config) == (offered.final.weights, offered.final.config)
    # The label of the same adapter may mean another base model elsewhere, as a relative path does.
    if is_same and (not base_is_named or offered.base_model == known.base_model):
        return _updated(known, offered, restore)
    if is_same and known.base_model == UNKNOWN_BASE:
        return _updated(known, offered, restore, base_model=offered.base_model, label=offered.label)
    if on_conflict == "skip":
        result = TaskIngested(known.name, "skipped", 0, 0, base_model=known.base_model, version=known.version)
        return known, result
    # Adapters of both came from the same place; the final one may be in another folder of a run.
    places = [{one.source for one in task.adapters} | {folder_of(task.final.source)} for task in (known, offered)]
    is_same_run = not places[0].isdisjoint(places[1])
    if on_conflict == "version" or (on_conflict is None and not is_same and is_same_run):
        return _version(known, offered, restore)
    if is_same:
        fact = f"task {known.name!r} belongs to base model {known.base_model!r}, not to {offered.base_model!r}"
        raise TaskConflict(known.name, fact=fact)
    raise TaskConflict(known.name)


def _version(known: Task, offered: Task, restore: bool) -> tuple[Task, TaskIngested]:
    """Return the next version: name, tags and note stay; code, vectors and measurements belong to the old adapter."""
    again = _again(known.checkpoints, offered.checkpoints, restore)
    task = replace(
        known,
        version=known.version + 1,
        base_model=offered.base_model,
        label=offered.label,
        final=offered.final,
        checkpoints=_by_step((*again.values(), *_unknown(offered.checkpoints, known.checkpoints))),
        samples=offered.samples or known.samples,
        eval_data=offered.eval_data or known.eval_data,
        vectors=(),
        code=None,
        measured=(),
    )
    new = 1 + len(_unknown(offered.checkpoints, known.adapters))
    return task, _result(task, "version", new, offered, known.checkpoints, again)


def _updated(known: Task, offered: Task, restore: bool, **base: str | None) -> tuple[Task, TaskIngested]:
    # The final adapter is recognised by its bytes alone: it may have come from a checkpoint's folder.
    final = _revised(known.final, offered.final, restore)
    again = _again(known.checkpoints, offered.checkpoints, restore)
    checkpoints = tuple(again.get(_key(one), one) for one in known.checkpoints)
    new = _unknown(offered.checkpoints, known.adapters)
    samples = offered.samples or known.samples
    changes: dict[str, Any] = dict(base)
    task = replace(
        known,
        final=final,
        checkpoints=_by_step((*checkpoints, *new)) if new else checkpoints,
        samples=samples,
        eval_data=offered.eval_data or known.eval_data,
        vectors=known.vectors if samples == known.samples else (),  # they are made from the samples
        **changes,
    )
    if task == known:
        task = known
    status = "known" if task is known else "updated"
    return task, _result(task, status, len(new), offered, known.adapters, {**again, _key(known.final): final})


def _result(
    task: Task,
    status: str,
    new: int,
    offered: Task,
    before: Sequence[StoredAdapter],
    after: Mapping[_Key, StoredAdapter],
) -> TaskIngested:
    """Return the result for a known task; `before` and `after` are the adapters that were offered again."""
    evicted = [_key(one) for one in before if one.is_evicted and _key(one) in after]
    left = sum(after[key].is_evicted for key in evicted)
    return TaskIngested(
        task.name,
        status,
        new,
        known=len(offered.adapters) - new,
        evicted=left,
        restored=len(evicted) - left,
        base_model=task.base_model,
        version=task.version,
    )


def _again(
    known: Sequence[StoredAdapter], offered: Sequence[StoredAdapter], restore: bool
) -> dict[_Key, StoredAdapter]:
    """Return the known adapters that are offered again, as they will be."""
    again = {_key(one): one for one in offered}
    return {_key(one): _revised(one, again[_key(one)], restore) for one in known if _key(one) in again}


def _revised(known: StoredAdapter, offered: StoredAdapter, restore: bool) -> StoredAdapter:
    """Return a known adapter with its weights if they come back, its initial weights, and later extras."""
    if known.was_never_here:  # a bundle described it
        return replace(offered, created_at=known.created_at)
    # The offered extras include the known ones that the store still has.
    files = {extra.file for extra in offered.extras}
    extras = (*offered.extras, *(extra for extra in known.extras if extra.file not in files))
    is_back = known.is_evicted and restore
    if is_back or (not known.is_evicted and known.initial is None and offered.initial is not None):
        shared: dict[str, Any] = {name: getattr(offered, name) for name in StoredAdapter.SHARED}
        learned = replace(known, initial=offered.initial, tensors_key=offered.tensors_key, evicted_at=None)
        return replace(learned, extras=extras, **shared)
    return replace(known, extras=extras)


_Key = tuple[str, str, int | None]
"""Distinguishes the checkpoints of a task: weights, configuration, step."""


def _key(adapter: StoredAdapter) -> _Key:
    return adapter.weights, adapter.config, adapter.step


def _unknown(offered: Iterable[StoredAdapter], known: Iterable[StoredAdapter]) -> tuple[StoredAdapter, ...]:
    """Return the offered adapters that are not among those known, each once, by step."""
    seen = {_key(one) for one in known}
    return _by_step({_key(one): one for one in offered if _key(one) not in seen}.values())


def _by_step(adapters: Iterable[StoredAdapter]) -> tuple[StoredAdapter, ...]:
    return tuple(sorted(adapters, key=lambda one: -1 if one.step is None else one.step))
