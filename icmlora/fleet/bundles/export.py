"""Write the generator of one base model and the codes of some tasks into one file, for use without the store."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.bundle.file import bundle_digest, write_bundle
from icmlora.bundle.index import MAX_CARD_BYTES, BundleIndex, blobs_of, bundled_generator, bundled_task
from icmlora.errors import CodeError, DataError
from icmlora.fleet.context import Context, select_tasks, use_case
from icmlora.fleet.resources.stored_vectors import latest_vectors
from icmlora.generator.codec.code import generator_of
from icmlora.generator.files.file import versions_of
from icmlora.io.staging import check_absent
from registry.errors import DamagedStore
from registry.manifests import Generator, Task, Vector

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class ExportReport:
    """A written bundle."""

    file: Path
    digest: str  # SHA-256 that identifies the whole file
    size: int
    index: BundleIndex
    left_out: tuple[str, ...]  # tasks without a code
    of_other_generators: tuple[str, ...] = ()  # tasks whose code needs another generator
    damaged: Mapping[str, str] = field(default_factory=dict)  # tasks that are not in it because of damage, and why


@use_case
def export_bundle(
    context: Context, file: str | Path, tasks: Sequence[str] = (), *, base_model: str | None = None, force: bool = False
) -> ExportReport:
    """Write the generator and the codes of some tasks into one file; `icmlora.Bundle` reads it without a store.

    A bundle has no originals and no texts. The same store gives the same bytes.

    Args:
        context: The store.
        file: The bundle to write.
        tasks: Names of tasks; by default all that have a code.
        base_model: Only tasks of this base model. Needed if the tasks have several.
        force: Replace a file that exists.

    Raises:
        DataError: A named task has no code, or the tasks have several base models.
        OutputExists: The file exists and `force` is not given.
    """
    path = Path(file)
    check_absent(path, force=force)
    with context.open(read_only=True) as store:
        generator, chosen, without, others = _choose(store, tasks, base_model)
        entries, damaged = _readable(store, chosen)
        if damaged and (tasks or not entries):
            name, reason = next(iter(damaged.items()))
            hint = "run `icm verify --repair` to move damaged files aside, or export only the other tasks"
            raise CodeError(f"task {name!r} cannot be exported: {reason}", hint=hint)
        alone = bundled_generator(generator)
        # From here on the export keeps to these codes, even if other processes encode new ones.
        codes = {str(task.code.blob): task.name for task in entries if task.code is not None}
        made_by = {version.digest for version in versions_of(store.blobs.read(generator.blob))}
        written = write_bundle(
            path, alone, entries, lambda digest: _read_part(store, digest, codes, made_by), force=force
        )
        digest, size, index = bundle_digest(alone, entries)
        for done, part in enumerate(written, 1):
            context.progress(done, len(index.parts), codes.get(part, ""))
    return ExportReport(path, digest, size, index, without, others, damaged)


def _choose(
    store: Store, names: Sequence[str], base_model: str | None
) -> tuple[Generator, list[Task], tuple[str, ...], tuple[str, ...]]:
    """Find the tasks to export and the generator of their codes; also name those without a code, or of another one."""
    tasks = select_tasks(store, names, base_model)
    coded = [task for task in tasks if task.code is not None]
    without = tuple(task.name for task in tasks if task.code is None)
    if names and without:
        hint = "run `icm train --update` to encode them, or export only the other tasks"
        raise DataError(f"no code: {', '.join(without)}", hint=hint)
    bases = sorted({task.base_model for task in coded})
    if len(bases) > 1:
        fact = f"a bundle has one base model, but these tasks have {len(bases)}: {', '.join(bases)}"
        raise DataError(fact, hint="choose one with --base-model NAME, or name tasks of a single base model")
    if not coded:
        raise DataError("no task has a code to export", hint="run `icm train` to make codes")
    used = {str(task.code.generator) for task in coded if task.code is not None}
    current = store.generator(bases[0])
    digest = str(current.blob) if current is not None and (len(used) > 1 or current.blob in used) else min(used)
    mine = [task for task in coded if task.code is not None and task.code.generator == digest]
    others = tuple(task.name for task in coded if task not in mine)
    if (names and others) or not mine:
        fact = f"codes of several generators: {', '.join(others)} need another one than the rest"
        hint = "run `icm encode TASK` to encode them with the current generator, or export them separately"
        raise DataError(fact, hint=hint)
    return store.generator_of(digest, bases[0]), mine, without, others


def _readable(store: Store, tasks: Sequence[Task]) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks as a bundle has them, and the damage of those whose blobs cannot be read."""
    entries, damaged = list[Task](), dict[str, str]()
    for task in tasks:
        card = task.final.card
        final = replace(task.final, card=card if card is not None and card.size <= MAX_CARD_BYTES else None)
        entry = bundled_task(replace(task, final=final, vectors=tuple(_vectors(task.vectors))))
        try:
            for file in blobs_of(entry):
                store.blobs.read(file)
            entries.append(entry)
        except DamagedStore as error:
            damaged[task.name] = error.message
    return entries, damaged


def _vectors(vectors: Sequence[Vector]) -> list[Vector]:
    """Return the latest vectors of a task that share a file: the file with the context view if there are several."""
    latest = sorted(latest_vectors(vectors), key=lambda vector: vector.view == "context")
    return [vector for vector in latest if vector.blob == latest[-1].blob]


def _read_part(store: Store, digest: str, codes: Mapping[str, str], made_by: Collection[str]) -> bytes:
    """Read a part; a code must belong to the generator that is exported with it."""
    data = store.blobs.read(digest)
    if digest in codes and generator_of(data) not in made_by:
        fact = f"the code of {codes[digest]!r} belongs to another generator"
        raise CodeError(fact, hint="run `icm train` to encode it again")
    return data
