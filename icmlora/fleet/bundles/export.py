"""Write the generator of one base model and the codes of some tasks into one file, for use without the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from icmlora.bundle.file import bundle_digest, write_bundle
from icmlora.bundle.index import MAX_CARD_BYTES, BundleIndex, blobs_of, bundled_generator, bundled_task
from icmlora.errors import CodeError, DataError
from icmlora.fleet.context import Context, select_tasks, use_case
from icmlora.fleet.params import BaseModelName, Param, Tasks
from icmlora.io.staging import check_absent
from registry.errors import DamagedStore
from registry.manifests import Generator, Task

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
    of_other_generators: tuple[str, ...] = ()  # tasks with a code of another generator
    damaged: Mapping[str, str] = field(default_factory=dict)  # skipped tasks -> damage


@use_case
def export_bundle(
    context: Context,
    file: Annotated[str | Path, Param("Bundle to write.", "FILE")],
    tasks: Tasks = (),
    *,
    base_model: BaseModelName = None,
    force: Annotated[bool, Param("Overwrite FILE if it exists.", "--force -f")] = False,
) -> ExportReport:
    """Write a generator and the codes of tasks to a bundle file.

    On another machine, `icm materialize --from FILE` writes adapters without a store, and `icm import FILE` adds the
    bundle to a store. A bundle contains no originals or texts. Exports of an unchanged store are identical.

    Example:
      icm export fleet.icm

    Raises:
        DataError: A named task has no code, or the tasks have several base models.
        OutputExists: The file exists and `force` is not given.
    """
    path = Path(file)
    check_absent(path, force=force)
    from icmlora.fleet.resources.stored_vectors import latest_vectors
    from icmlora.generator.codec.code import generator_of
    from icmlora.generator.files.file import versions_of

    with context.open(read_only=True) as store:
        generator, chosen, without, others = _choose(store, tasks, base_model)
        entries, damaged = list[Task](), dict[str, str]()
        for task in chosen:
            card = task.final.card
            final = replace(task.final, card=card if card is not None and card.size <= MAX_CARD_BYTES else None)
            # Of the latest vectors, only those of one file: the file with the context view if there are several.
            latest = sorted(latest_vectors(task.vectors), key=lambda vector: vector.view == "context")
            vectors = tuple(vector for vector in latest if vector.blob == latest[-1].blob)
            entry = bundled_task(replace(task, final=final, vectors=vectors))
            try:
                for blob in blobs_of(entry):
                    store.blobs.read(blob)
                entries.append(entry)
            except DamagedStore as error:
                damaged[task.name] = error.message
        if damaged and (tasks or not entries):
            name, reason = next(iter(damaged.items()))
            hint = "run `icm verify --repair` to move damaged files aside, or export only the other tasks"
            raise CodeError(f"task {name!r} cannot be exported: {reason}", hint=hint)
        alone = bundled_generator(generator)
        # From here on the export keeps to these codes, even if other processes encode new ones.
        codes = {str(task.code.blob): task.name for task in entries if task.code is not None}
        made_by = {version.digest for version in versions_of(store.blobs.read(generator.blob))}

        def read(digest: str) -> bytes:
            data = store.blobs.read(digest)
            if digest in codes and generator_of(data) not in made_by:
                fact = f"the code of {codes[digest]!r} belongs to another generator"
                raise CodeError(fact, hint="run `icm train` to encode it again")
            return data

        digest, size, index = bundle_digest(alone, entries)
        for done, part in enumerate(write_bundle(path, alone, entries, read, force=force), 1):
            context.progress(done, len(index.parts), codes.get(part, ""))
    return ExportReport(path, digest, size, index, without, others, damaged)


def _choose(
    store: Store, names: Sequence[str], base_model: str | None
) -> tuple[Generator, list[Task], tuple[str, ...], tuple[str, ...]]:
    """Return the generator and the tasks to export, and the names of tasks without a code or with another generator."""
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
