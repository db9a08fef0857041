"""Decide what becomes of an offered task, and publish it. The same offer again changes nothing.

    known task, offer ──decide──▶ the task as it will be, and an outcome ──publish──▶ many at once
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from registry.errors import LostRace, MissingBlob, TaskConflict
from registry.manifests import Adapter, Extra, File, Task
from registry.names import UNKNOWN_BASE, check_name, folder_of

if TYPE_CHECKING:
    from registry.store import Store

OnConflict = Literal["version", "skip", "fail"]
Status = Literal["added", "updated", "known", "version", "skipped"]


@dataclass(frozen=True)
class Offer:
    """A task to be recorded with all its adapters."""

    name: str
    base_model: str  # any label of it; a known task with the same final adapter keeps the base model that it has
    final: Adapter
    checkpoints: tuple[Adapter, ...] = ()
    samples: File | None = None  # None keeps what the store has
    eval_data: File | None = None
    # If the task exists with another final adapter: None adds a version if it comes from the same folder, else fails.
    on_conflict: OnConflict | None = None
    restore: bool = False  # store the weights of evicted adapters again
    base_is_told: bool = False  # by the user, because the adapters name none: a known task without one gets it

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All its adapters, the final one last."""
        return (*self.checkpoints, self.final)


@dataclass(frozen=True)
class Outcome:
    """What became of an offer."""

    name: str  # as the store spells it
    status: Status
    new: int  # adapters that were not in the store
    known: int
    base_model: str  # its name, whatever label was given
    version: int = 1
    evicted: int = 0  # known adapters that stay evicted
    restored: int = 0


def record(store: Store, offers: Sequence[Offer], withheld: Collection[str] = ()) -> list[Outcome]:
    """Publish offered tasks in one transaction; their blobs are in the store already.

    Args:
        store: The store.
        offers: Tasks of different names.
        withheld: Digests of evicted weights that were not stored.

    Raises:
        TaskConflict: A task has another adapter in the store, and its offer does not say what to do.
        MissingBlob: The weights of a task were withheld, but it needs them by now.
    """
    while True:
        decided = decide_all(store, offers)
        for task, _ in decided:
            if task is not None:
                _check_weights(store, task, withheld)
        try:
            store.publish([task for task, outcome in decided if task is not None])
        except LostRace:
            continue
        return [outcome for _, outcome in decided]


def plan(store: Store | None, offers: Sequence[Offer]) -> list[Outcome]:
    """Return what `record` would do; None is a store that is still to be made."""
    return [outcome for _, outcome in decide_all(store, offers)]


def decide_all(store: Store | None, offers: Sequence[Offer]) -> list[tuple[Task | None, Outcome]]:
    """Return each task as it will be, None if it stays as it is, and the outcome."""
    if len({check_name(offer.name).lower() for offer in offers}) != len(offers):
        raise ValueError("two tasks in the batch have the same name")
    if store is None:
        return [decide(None, offer, offer.base_model) for offer in offers]
    bases = {label: store.base_name(label) for label in {offer.base_model for offer in offers}}
    return [decide(store.find(offer.name), offer, bases[offer.base_model]) for offer in offers]


def decide(known: Task | None, offer: Offer, base: str) -> tuple[Task | None, Outcome]:
    """Decide about one offer, whose base model is called `base` in the store."""
    label = None if base == offer.base_model else offer.base_model
    if known is None:
        return _added(offer, base, label)
    is_same = (known.final.weights, known.final.config) == (offer.final.weights, offer.final.config)
    # The label of the same adapter may mean another base model elsewhere, as a relative path does.
    if is_same and (not offer.base_is_told or base == known.base_model):
        return _updated(known, offer)
    if is_same and known.base_model == UNKNOWN_BASE:
        return _updated(replace(known, base_model=base, label=label), offer, is_changed=True)
    if offer.on_conflict == "skip":
        return None, Outcome(known.name, "skipped", 0, 0, known.base_model, known.version)
    is_same_folder = folder_of(known.final.source) == folder_of(offer.final.source)
    if offer.on_conflict == "fail" or (offer.on_conflict is None and not is_same_folder):
        raise TaskConflict(known.name)
    return _version(known, offer, base, label)


def _added(offer: Offer, base: str, label: str | None) -> tuple[Task, Outcome]:
    task = Task(
        name=offer.name,
        base_model=base,
        label=label,
        final=offer.final,
        checkpoints=_unknown(offer.checkpoints, ()),
        samples=offer.samples,
        eval_data=offer.eval_data,
    )
    return task, Outcome(task.name, "added", len(task.adapters), len(offer.adapters) - len(task.adapters), base)


def _version(known: Task, offer: Offer, base: str, label: str | None) -> tuple[Task, Outcome]:
    """Return the next version; what people said of the task still holds, what was made of its adapter does not."""
    new, outcome = _added(offer, base, label)
    task = replace(
        new,
        name=known.name,
        version=known.version + 1,
        samples=offer.samples or known.samples,
        eval_data=offer.eval_data or known.eval_data,
        tags=known.tags,
        note=known.note,
        pinned=known.pinned,
        aliases=known.aliases,
        created_at=known.created_at,
        seq=known.seq,
        manifest=known.manifest,
        more=known.more,
    )
    return task, replace(outcome, name=known.name, status="version", version=task.version)


def _updated(known: Task, offer: Offer, *, is_changed: bool = False) -> tuple[Task | None, Outcome]:
    offered = {_key(one): one for one in offer.checkpoints}
    back = [one for one in known.adapters if one.is_evicted and (offer.restore or one.was_never_here)]
    final = _revised(known.final, offer.final, known.final in back)
    # A known task's final adapter is known by its bytes alone: it may have come from a checkpoint's folder.
    checkpoints = tuple(
        _revised(one, offered[_key(one)], one in back) if _key(one) in offered else one for one in known.checkpoints
    )
    new = _unknown(offer.checkpoints, known.checkpoints)
    task = replace(
        known,
        final=final,
        checkpoints=tuple(sorted((*checkpoints, *new), key=lambda one: -1 if one.step is None else one.step)),
        samples=offer.samples or known.samples,
        eval_data=offer.eval_data or known.eval_data,
    )
    if task.samples != known.samples:  # vectors are made from the samples
        task = replace(task, vectors=())
    met = [one for one in known.checkpoints if _key(one) in offered]
    evicted = sum(one.is_evicted for one in (known.final, *met))
    restored = evicted - sum(one.is_evicted for one in (final, *(one for one in checkpoints if _key(one) in offered)))
    outcome = Outcome(
        known.name,
        "updated" if is_changed or task != known else "known",
        len(new),
        len(offer.adapters) - len(new),
        known.base_model,
        known.version,
        evicted - restored,
        restored,
    )
    return (task if outcome.status == "updated" else None), outcome


def _revised(known: Adapter, offered: Adapter, is_back: bool) -> Adapter:
    """Return a known adapter with what is learned of it now: it is back, has its initial weights, or further files."""
    files = {extra.file for extra in known.extras}
    extras: tuple[Extra, ...] = (
        *known.extras,
        *(extra for extra in offered.extras if extra.file is not None and extra.file not in files),
    )
    if is_back:
        if known.was_never_here:  # until now all that was known of it is what the bundle says
            return replace(offered, created_at=known.created_at)
        return replace(offered, created_at=known.created_at, source=known.source, card=known.card, extras=extras)
    if known.initial is None and offered.initial is not None and not known.is_evicted:
        shared = {name: getattr(offered, name) for name in Adapter.SHARED}
        return replace(known, initial=offered.initial, tensors_key=offered.tensors_key, extras=extras, **shared)
    return replace(known, extras=extras)


def _unknown(offered: Iterable[Adapter], known: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """Return the adapters that are not among those known, each once, by step."""
    seen = {_key(one) for one in known}
    new = {_key(one): one for one in offered if _key(one) not in seen}
    return tuple(sorted(new.values(), key=lambda one: -1 if one.step is None else one.step))


def _key(adapter: Adapter) -> tuple[str, str, int | None]:
    return adapter.weights, adapter.config, adapter.step


def _check_weights(store: Store, task: Task, withheld: Collection[str]) -> None:
    for adapter in task.adapters:
        for file in () if adapter.is_evicted else adapter.evictable:
            if file in withheld and not store.blobs.exists(file):
                raise MissingBlob(f"blob {file} is missing", hint="run the same command again")
