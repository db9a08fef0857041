"""Merge the adapters of several tasks into one, as a folder or as a task of the store.

originals, codes ──PEFT──▶ one adapter ──▶ PEFT folder
                                 └───────▶ task, with its parts in its card
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from icmlora.adapter.merge import METHODS, WITH_DENSITY, MergeMethod, merged
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused, DataError, OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.adapter_row import new_adapter
from icmlora.fleet.resources.code_source import StoreCodes
from icmlora.fleet.write.cards import MergedCard, MergedPart
from icmlora.fleet.write.materialize import Source, choose
from icmlora.formats.format import AdapterBytes, write_adapter_files
from icmlora.formats.peft.peft import PEFT
from icmlora.formats.tensor_hash import tensors_key
from icmlora.io.staging import check_free
from icmlora.io.text import counted
from registry.errors import TaskConflict
from registry.manifests import File, Task
from registry.names import check_name, split_label
from registry.store import Store


@dataclass(frozen=True)
class Merged:
    """One adapter that was made of several."""

    directory: Path | None  # where it was written
    task: str | None  # as which it was stored
    base_model: str
    method: MergeMethod
    parts: tuple[MergedPart, ...]
    rank: int  # the largest of a module
    density: float | None  # None where the method has none
    size: int  # bytes of its weights
    weights: str  # SHA-256 of them


@use_case
def merge(
    context: Context,
    tasks: Sequence[str],
    directory: str | Path | None = None,
    *,
    name: str | None = None,
    method: MergeMethod = "svd",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    source: Source = "auto",
    dtype: str = "bfloat16",
    force: bool = False,
) -> Merged:
    """Make one adapter of several by PEFT's `add_weighted_adapter`. Needs no base model.

    All of them are in memory at the same time. The same arguments give the same bytes.

    Args:
        context: The store.
        tasks: Names of tasks of one base model.
        directory: Folder to write, absent or empty.
        name: Also, or only, store it as this new task.
        method: One of `icmlora.adapter.merge.METHODS`: `svd`, `cat`, `linear`, `ties`, `dare_linear` and the others.
        weights: What each adapter is multiplied with; by default equal parts that add up to 1.
        rank: Largest rank, for methods that end in `svd`; by default the largest of the adapters.
        density: Share of values that `ties`, `dare` and `magnitude_prune` keep.
        seed: Of the values that `dare` drops.
        source: What each adapter is made from, as for `materialize`.
        dtype: Number format of the weights: `bfloat16`, `float16` or `float32`.
        force: Replace the adapter in a folder that is not empty.

    Raises:
        OptionsConflict: Neither a folder nor a name is given, the method sets the rank itself, or not every task has a
            weight.
        DataError: The tasks are of several base models, have more than LoRA factors, or do not fit each other.
        OutputExists: The folder is not empty, and `force` is not given.
        TaskConflict: The name is taken.
    """
    shares = _shares(tasks, method, weights, has_rank=rank is not None)
    if directory is None and name is None:
        hint = "use -o DIR to write a folder, or --as NAME to store a task"
        raise OptionsConflict("no destination for the merged adapter was specified", hint=hint)
    if directory is not None:
        check_free(Path(directory), force=force)
    if name is not None:
        check_name(name)
    with context.open(read_only=name is None) as store:
        if name is not None and (taken := store.find(name)) is not None:
            raise TaskConflict(taken.name, choices=None)
        codes = StoreCodes(store, context)
        found = [store.task(task) for task in tasks]
        base_model = _one_base(found)
        adapters, parts = list[Adapter](), list[MergedPart]()
        for done, (task, share) in enumerate(zip(found, shares, strict=True)):
            context.progress(done, len(found), task.name)
            adapter, part = _read(codes, task, source, share)
            adapters.append(adapter)
            parts.append(part)
        context.progress(len(found), len(found), "merging")
        made = merged(adapters, shares, method, rank=rank, density=density, seed=seed)
        how = f"{method}, density {density:g}" if method in WITH_DENSITY else method
        label, revision = split_label(base_model)
        made = replace(made, base_model=label, revision=revision)
        card = MergedCard(name or "merged", base_model, how, tuple(parts))
        content = PEFT.encode(made, dtype=dtype, card=card.text(), metadata=card.metadata())
        if directory is not None:
            write_adapter_files(Path(directory), PEFT, content, "", force=force)
        if name is not None:
            _publish(store, name, base_model, content, card.source)
    return Merged(
        directory=None if directory is None else Path(directory),
        task=name,
        base_model=base_model,
        method=method,
        parts=tuple(parts),
        rank=max(shape.rank for shape in made.layout),
        density=density if method in WITH_DENSITY else None,
        size=len(content.weights),
        weights=hashlib.sha256(content.weights).hexdigest(),
    )


def _shares(
    tasks: Sequence[str], method: MergeMethod, weights: Sequence[float] | None, *, has_rank: bool
) -> Sequence[float]:
    """Return what each adapter is multiplied with."""
    if method not in METHODS:
        raise DataError(f"there is no method {method!r}", hint=f"choose one of {', '.join(METHODS)}")
    if has_rank and not method.endswith("svd"):
        raise OptionsConflict(f"{method} sets the rank itself", hint="leave out --rank, or choose a method with svd")
    if len(set(tasks)) < 2:
        raise DataError("a merge needs at least two tasks", hint="specify two or more different tasks")
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if list(tasks).count(task) > 1)
        raise DataError(f"{twice} is named twice", hint="specify it once, and set its weight with --weights")
    if weights is None:
        return [1 / len(tasks)] * len(tasks)
    if len(weights) != len(tasks):
        fact = f"there are {counted(len(weights), 'weight')} for {counted(len(tasks), 'task')}"
        raise OptionsConflict(fact, hint="specify one weight for each task, in the same order")
    return weights


def _one_base(tasks: Sequence[Task]) -> str:
    first = tasks[0]
    for task in tasks:
        if task.base_model != first.base_model:
            fact = f"{first.name} is for {first.base_model}, and {task.name} is for {task.base_model}"
            raise DataError(fact, hint="merge only tasks of one base model")
    return first.base_model


def _read(codes: StoreCodes, task: Task, source: Source, weight: float) -> tuple[Adapter, MergedPart]:
    """Read the adapter of a task, which must be a plain LoRA."""
    chosen = choose(codes, task, source)
    if task.not_encodable is not None:
        raise AdapterRefused(f"{task.name} cannot be merged: {task.not_encodable}", kind="original-only")
    if any(extra.file is None for extra in task.final.extras):
        fact = f"{task.name} cannot be merged: it has tensors besides its LoRA factors, such as a head or magnitudes"
        raise AdapterRefused(
            fact, kind="extras", hint="run `icm show --json` to list them, and merge only tasks without such tensors"
        )
    return chosen.reader()(), MergedPart(task.name, weight, chosen.source, str(task.final.weights))


def _publish(store: Store, name: str, base_model: str, content: AdapterBytes, source: str) -> None:
    """Publish a merged adapter as if it had been ingested."""

    def put(data: bytes) -> File:
        return File(store.blobs.put(data), len(data))

    final = new_adapter(
        PEFT.inspect(content.config, content.weights),
        weights=put(content.weights),
        config=put(content.config),
        card=None if content.card is None else put(content.card),
        source=source,
    )
    final = replace(final, tensors_key=tensors_key(content.weights))
    store.publish([Task(name=name, base_model=base_model, final=final)])
