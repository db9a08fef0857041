"""Import the generator, codes and tasks of a bundle into a store. The originals are not in a bundle.

    bundle --check every byte--> decide --> blobs, durable --> publish: generator and tasks together

Until then the store does not change. A killed import leaves unreferenced blobs, which `icm prune` removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from icmlora.bundle.file import open_bundle
from icmlora.bundle.index import blobs_of, imported
from icmlora.errors import AdapterRefused, BundleError, DataError, UnsafeInput
from icmlora.fleet.bases.labels import renumbered
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import DryRun, Param
from icmlora.fleet.resources.adapter_row import template_of
from icmlora.fleet.resources.code_source import check_files, check_vectors, find_task
from icmlora.formats.base_references import REFERENCES
from icmlora.formats.catalogue import format_named
from icmlora.formats.extras import unpack_tensors, unpacked_size
from icmlora.formats.peft.config import AdapterConfig
from icmlora.formats.peft.peft import PEFT
from registry.encoding import encode, files_of
from registry.errors import LostRace, StoreNotFound, TaskConflict
from registry.manifests import State, Task, now
from registry.names import bundle_source

if TYPE_CHECKING:
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.bundle.file import BundleFile
    from icmlora.bundle.index import BundleIndex
    from registry.store import Store

_BATCH_BYTES = 64 << 20
_MAX_TRIED = 64 << 20
"""Maximum values of an adapter that is written for trial, so that a forged bundle cannot exhaust the memory."""

ImportStatus = Literal["added", "encoded", "known", "skipped"]
"""`encoded`: the store had the adapter, and now has its code."""
OnConflict = Literal["skip", "fail"]


@dataclass(frozen=True)
class ImportReport:
    """The imported tasks, or those that would be imported."""

    index: BundleIndex
    digest: str  # SHA-256 that identifies the whole bundle
    tasks: Mapping[str, ImportStatus]  # by name, as the store spells it
    refused: Mapping[str, str]  # skipped tasks -> why their adapter cannot be written


@use_case
def import_bundle(
    context: Context,
    file: Annotated[str | Path, Param("A bundle written by `icm export`.", "FILE")],
    tasks: Annotated[
        Sequence[str],
        Param("Tasks of the bundle, as listed by `icm ls --from FILE`. Default: all.", "[TASK]..."),
    ] = (),
    *,
    on_conflict: Annotated[
        OnConflict, Param("What to do if a stored task of this name has a different adapter or code.")
    ] = "fail",
    dry_run: DryRun = False,
) -> ImportReport:
    """Add the generator, codes and tasks of a bundle to the store.

    A bundle contains no originals, so adapters of new tasks are decoded from their codes. A stored task with the same
    original gets the code. The generator of the bundle is added to the store; it is used for new codes only if
    the base model had none. Tasks whose adapter cannot be written are skipped, and the exit code is 3. Repeated imports
    change nothing.

    Example:
      icm import fleet.icm

    Raises:
        BundleError: The bundle is damaged, cut short, or of another format.
        AdapterRefused: None of the tasks has an adapter that can be written.
        TaskConflict: A task has another adapter or code in the store, and `on_conflict` is `fail`.
    """
    with open_bundle(Path(file)) as bundle:
        index = bundle.index
        names = {find_task(index, name).name for name in tasks}
        wanted = [task for task in index.tasks if not names or task.name in names]
        context.progress(0, None, "checking")
        bundle.check()
        _check_parts(bundle, wanted)
        refused = _refused(bundle, wanted)
        wanted = [task for task in wanted if task.name not in refused]
        if not dry_run:
            with context.open(create=True) as store:
                decided = _import(context, store, bundle, wanted, on_conflict)
        else:
            try:
                with context.open(read_only=True) as store:
                    decided = _decide(store, bundle, wanted, on_conflict)
            except StoreNotFound:
                decided = _decide(None, bundle, wanted, on_conflict)
    return ImportReport(index, bundle.digest, {name: status for name, (status, _) in decided.items()}, refused)


Decisions = Mapping[str, tuple[ImportStatus, State | None]]
"""The status of each task, by its name in the store, and the state to publish."""


def _import(
    context: Context, store: Store, bundle: BundleFile, tasks: Sequence[Task], on_conflict: OnConflict
) -> Decisions:
    generator, stored = bundle.index.generator, set[str]()
    while True:
        decided = _decide(store, bundle, tasks, on_conflict)
        new = {name.lower(): state for name, (_, state) in decided.items() if state is not None}
        if new:
            _put(context, store, bundle, [task for task in tasks if task.name.lower() in new.keys() - stored])
            stored |= new.keys()
            base = store.base_name(generator.base_model)
            states: list[State] = []
            if not any(one.blob == generator.blob for one in store.generators(base)):
                added = replace(generator, base_model=base, created_at=now(), manifest=None)
                current = store.generator(base)  # stays in use if there is one
                states = [added] if current is None else [*renumbered(store, base, [added], current, current)]
            try:
                store.publish([*states, *new.values()])
            except (LostRace, TaskConflict):  # another process changed or added one of them
                continue
        # Blobs of known tasks and their generators that the store has lost come back.
        known: list[State] = [store.task(name) for name, (_, state) in decided.items() if state is None]
        known += store.generators(store.base_name(bundle.index.base_model))
        needed = {str(file) for state in known for _, file in files_of(encode(state).body)}
        lost = [part for part in sorted(needed & set(map(str, bundle.index.parts))) if not store.blobs.exists(part)]
        store.blobs.put_all([bundle.read(part) for part in lost])
        return decided


def _decide(store: Store | None, bundle: BundleFile, tasks: Sequence[Task], on_conflict: OnConflict) -> Decisions:
    label, moment, source = bundle.index.base_model, now(), bundle_source(bundle.digest)
    base = label if store is None else store.base_name(label)
    decided: dict[str, tuple[ImportStatus, State | None]] = {}
    for task in tasks:
        known = None if store is None else store.find(task.name)
        if known is None:
            alias = None if base == label else label
            new = imported(task, source=source, base_model=base, label=alias, moment=moment)
            decided[task.name] = "added", new
            continue
        adapters = {(one.final.weights, one.final.config) for one in (known, task)}
        is_same = known.base_model == base and len(adapters) == 1
        if is_same and known.code is None:
            decided[known.name] = "encoded", replace(known, code=task.code)
        elif is_same and known.code is not None and task.code is not None and known.code.blob == task.code.blob:
            decided[known.name] = "known", None
        elif on_conflict == "fail":
            raise TaskConflict(known.name, choices="skip")
        else:
            decided[known.name] = "skipped", None
    return decided


def _put(context: Context, store: Store, bundle: BundleFile, tasks: Sequence[Task]) -> None:
    """Store the blobs that some tasks need, a few at a time."""
    if not tasks:
        return
    digests = list(dict.fromkeys(file for state in (bundle.index.generator, *tasks) for file in blobs_of(state)))
    batch: list[bytes] = []
    for done, digest in enumerate(digests, 1):
        batch.append(bundle.read(digest))
        if done == len(digests) or sum(map(len, batch)) >= _BATCH_BYTES:
            store.blobs.put_all(batch)
            batch = []
            context.progress(done, len(digests))


def _check_parts(bundle: BundleFile, tasks: Sequence[Task]) -> None:
    """Check that every version of the generator opens, and that codes, files and vectors match it and their tasks."""
    from icmlora.generator.codec.code import generator_of
    from icmlora.generator.codec.generator_file import GeneratorFile

    generator_file = GeneratorFile(bundle.read(bundle.index.generator.blob))
    for number in range(len(generator_file.digests)):
        generator_file.codec(number)
    for task in tasks:
        assert task.code is not None  # as every task of a bundle has
        if generator_of(bundle.read(task.code.blob)) not in generator_file.digests:
            raise BundleError(f"the code of {task.name!r} belongs to another generator")
        check_files(task)
        check_vectors(task, bundle)


def _refused(bundle: BundleFile, tasks: Sequence[Task]) -> dict[str, str]:
    """Return task -> why its adapter cannot be written."""
    refused: dict[str, AdapterRefused] = {}
    tried: set[tuple[object, ...]] = set()
    for task in tasks:
        final = task.final
        form = final.format, final.config, final.layout, final.dtype, final.template, str(final.extras)
        if form not in tried:  # most of a fleet have one form
            try:
                _try_form(bundle, task)
                tried.add(form)
            except UnsafeInput:
                raise
            except AdapterRefused as error:
                refused[task.name] = error
    if tasks and len(refused) == len(tasks):
        name, first = next(iter(refused.items()))
        raise AdapterRefused(f"task {name!r}: {first.message}", kind=first.kind, hint=first.hint)
    return {name: error.message for name, error in refused.items()}


def _try_form(bundle: BundleFile, task: Task) -> None:
    """Write an adapter of zeros in the form of a task's original, which decoded adapters will have.

    Adapters of more than `_MAX_TRIED` values are not tried; their faults show when they are written.

    Raises:
        AdapterRefused: Its configuration or recorded form is damaged or does not fit it.
    """
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.formats.factors import fitted
    from icmlora.formats.peft.initial import converted_form

    final = task.final
    known, config = format_named(final.format), bundle.read(final.config)
    known.read_config(config)  # it may name a mirror of the base model
    template = template_of(final, config)
    if final.format == PEFT.name:
        AdapterConfig.parse(converted_form(template).config)
    packed = [(extra, bundle.read(extra.blob)) for extra in final.extras if extra.file is None]
    is_large = final.parameters + sum(extra.size for extra in final.extras) > _MAX_TRIED
    if is_large or any(data.startswith(REFERENCES) for _, data in packed):  # these need tensors of the base model
        return
    first = template.layout[0]  # formats add zeros for missing modules, but need at least one module
    zeros = LoraModule(first.module, *fitted(None, first.rank, first.inputs, first.outputs))
    adapter = Adapter(bundle.index.base_model, None, (), (zeros,))
    try:
        if any(unpacked_size(data) != extra.size for extra, data in packed):
            raise DataError("the size of an extra differs from the size in the bundle's index")
        extras = unpack_tensors([data for _, data in packed], _no_base)
        known.encode(adapter, card="", metadata={}, like=template, extras=extras)
    except DataError as error:
        raise AdapterRefused(error.message, kind="extras") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        fact = "the recorded form of the original does not fit it"
        raise AdapterRefused(fact, kind="template") from error


def _no_base() -> BaseTensors:
    raise AssertionError("only references need the base model")
