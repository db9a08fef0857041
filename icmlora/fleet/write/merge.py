"""Merge the adapters of several tasks into one, as a folder or as a task of the store.

originals, codes ──PEFT──▶ one adapter ──▶ PEFT folder
                                 └───────▶ task, with its parts in its card
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.adapter.merge_methods import METHODS, WITH_DENSITY, MergeMethod
from icmlora.errors import AdapterRefused, DataError, OptionsConflict
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import Force, NamedTasks, Param, WeightFormat
from icmlora.fleet.resources.adapter_row import new_adapter
from icmlora.fleet.resources.code_source import StoreCodes
from icmlora.fleet.write.sources import resolve_source
from icmlora.formats.format import write_adapter_files
from icmlora.formats.peft.peft import PEFT
from icmlora.formats.tensor_hash import tensors_key
from icmlora.io.staging import check_free
from icmlora.io.text import counted
from registry.errors import TaskConflict
from registry.manifests import File, Task
from registry.names import check_name, split_label

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.fleet.write.cards import MergedPart


@dataclass(frozen=True)
class Merged:
    """One adapter that was made of several."""

    directory: Path | None  # where it was written
    task: str | None  # as which it was stored
    base_model: str
    method: MergeMethod
    parts: tuple[MergedPart, ...]
    rank: int  # the largest of a module
    density: float | None  # None if the method has none
    size: int  # bytes of its weights
    weights: str  # SHA-256 of them


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionsConflict(f"--weights {text!r} is not a list of numbers", hint="write it as 0.7,0.3") from None


@use_case
def merge(
    context: Context,
    tasks: NamedTasks,
    directory: Annotated[
        str | Path | None, Param("Folder to write. Must be absent or empty.", "--output -o DIR")
    ] = None,
    *,
    name: Annotated[
        str | None, Param("Store the merged adapter as a new task. Can be combined with --output.", "--as NAME")
    ] = None,
    method: Annotated[
        MergeMethod,
        Param(
            "PEFT merge method. cat: the exact weighted sum; ranks add up. svd: the sum, reduced to --rank. linear, "
            "ties, dare_linear, dare_ties, magnitude_prune: merge A and B separately; all adapters need the same rank. "
            "Other methods ending in _svd: merge the full dW and reduce it to --rank; slow."
        ),
    ] = "svd",
    weights: Annotated[
        Sequence[float] | None,
        Param(
            "Weight of each adapter, as 0.7,0.3. Default: equal weights that sum to 1.",
            "--weights W,W,...",
            parse=_numbers,
        ),
    ] = None,
    rank: Annotated[
        int | None, Param("Rank for svd methods. Default: the largest rank of the adapters.", "--rank R", min=1)
    ] = None,
    density: Annotated[
        float,
        Param("Fraction of values that ties, dare and magnitude_prune keep.", "--density X", min=0.0, max=1.0),
    ] = 0.5,
    seed: Annotated[int, Param("Random seed for dare methods.", "--seed N")] = 0,
    source: Annotated[
        Literal["auto", "original", "code"],
        Param("Merge originals or decoded codes. auto: the original if the store has it."),
    ] = "auto",
    dtype: WeightFormat = "bfloat16",
    force: Force = False,
) -> Merged:
    """Merge the adapters of several tasks into one.

    Uses PEFT's merge methods. The base model is not needed, but all adapters must fit in memory together. Store the
    result with --as, then check its quality with `icm eval NAME --data FILE`.

    Example:
      icm merge cats dogs -o pets/
      icm merge cats dogs --method ties_svd --weights 0.7,0.3 --density 0.2 --as pets

    Raises:
        OptionsConflict: Neither a folder nor a name is given, the method sets the rank itself, or not every task has a
            weight.
        DataError: The tasks are of several base models, have more than LoRA factors, or do not fit each other.
        OutputExists: The folder is not empty, and `force` is not given.
        TaskConflict: The name is taken.
    """
    if method not in METHODS:
        raise DataError(f"there is no method {method!r}", hint=f"choose one of {', '.join(METHODS)}")
    if rank is not None and not method.endswith("svd"):
        raise OptionsConflict(f"{method} sets the rank itself", hint="leave out --rank, or choose a method with svd")
    if len(set(tasks)) < 2:
        raise DataError("a merge needs at least two tasks", hint="specify two or more different tasks")
    if len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if list(tasks).count(task) > 1)
        raise DataError(f"{twice} is named twice", hint="specify it once, and set its weight with --weights")
    shares = [1 / len(tasks)] * len(tasks) if weights is None else weights
    if len(shares) != len(tasks):
        fact = f"there are {counted(len(shares), 'weight')} for {counted(len(tasks), 'task')}"
        raise OptionsConflict(fact, hint="specify one weight for each task, in the same order")
    if directory is None and name is None:
        hint = "use -o DIR to write a folder, or --as NAME to store a task"
        raise OptionsConflict("no destination for the merged adapter was specified", hint=hint)
    output = None if directory is None else Path(directory)
    if output is not None:
        check_free(output, force=force)
    if name is not None:
        check_name(name)
    from icmlora.adapter.merge import merged
    from icmlora.fleet.write.cards import MergedPart, merged_card

    with context.open(read_only=name is None) as store:
        if name is not None and (taken := store.find(name)) is not None:
            raise TaskConflict(taken.name, choices=None)
        codes, found = StoreCodes(store, context), [store.task(task) for task in tasks]
        first, parts = found[0], list[MergedPart]()
        adapters: list[Adapter] = []
        for task in found:
            _check_mergeable(task, first)
        for task, share in zip(found, shares, strict=True):
            context.progress(len(parts), len(found), task.name)
            resolved = resolve_source(codes, task, source)
            adapters.append(resolved.reader()())
            parts.append(MergedPart(task.name, share, resolved.source, str(task.final.weights)))
        context.progress(len(found), len(found), "merging")
        made = merged(adapters, shares, method, rank=rank, density=density, seed=seed)
        how = f"{method}, density {density:g}" if method in WITH_DENSITY else method
        label, revision = split_label(first.base_model)
        origin = f"merged {', '.join(f'{part.weight:.3g} {part.task}' for part in parts)} ({how})"
        content = PEFT.encode(
            replace(made, base_model=label, revision=revision),
            dtype=dtype,
            card=merged_card(name or "merged", first.base_model, how, parts),
            metadata={"icm_task": name or "merged", "icm_rung": "merged", "icm_source": origin},
        )
        if output is not None:
            write_adapter_files(output, PEFT, content, "", force=force)
        if name is not None:

            def put(data: bytes) -> File:
                return File(store.blobs.put(data), len(data))

            final = new_adapter(
                PEFT.inspect(content.config, content.weights),
                weights=put(content.weights),
                config=put(content.config),
                card=None if content.card is None else put(content.card),
                source=origin,
            )
            final = replace(final, tensors_key=tensors_key(content.weights))
            store.publish([Task(name=name, base_model=first.base_model, final=final)])
    return Merged(
        directory=output,
        task=name,
        base_model=first.base_model,
        method=method,
        parts=tuple(parts),
        rank=max(shape.rank for shape in made.layout),
        density=density if method in WITH_DENSITY else None,
        size=len(content.weights),
        weights=hashlib.sha256(content.weights).hexdigest(),
    )


def _check_mergeable(task: Task, first: Task) -> None:
    """Raise an error unless a task has the base model of the first one, and a plain LoRA."""
    if task.base_model != first.base_model:
        fact = f"{first.name} is for {first.base_model}, and {task.name} is for {task.base_model}"
        raise DataError(fact, hint="merge only tasks of one base model")
    if task.not_encodable is not None:
        raise AdapterRefused(f"{task.name} cannot be merged: {task.not_encodable}", kind="original-only")
    if any(extra.file is None for extra in task.final.extras):
        fact = f"{task.name} cannot be merged: it has tensors besides its LoRA factors, such as a head or magnitudes"
        raise AdapterRefused(
            fact, kind="extras", hint="run `icm show --json` to list them, and merge only tasks without such tensors"
        )
