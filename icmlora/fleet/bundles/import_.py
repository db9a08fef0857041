"""Take the generator, codes and tasks of a bundle into a store. The originals are not in a bundle.

    bundle --check every byte--> --decide--> blobs, durable --> one transaction: generator, tasks, codes

Until the transaction the store is as it was. A killed import leaves blobs without rows, which `icm prune` removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.bundle.file import open_bundle
from icmlora.errors import AdapterRefused, BundleError, DataError, UnsafeInput
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.bundle_codes import bundled_adapter, bundled_vectors, claim_of, find_task
from icmlora.formats.base_references import REFERENCES
from icmlora.formats.catalogue import format_named
from icmlora.formats.extras import unpack_tensors, unpacked_size
from icmlora.formats.format import Template, check_companions
from icmlora.formats.peft.config import AdapterConfig
from icmlora.formats.peft.initial import converted_form
from icmlora.formats.peft.peft import PEFT
from icmlora.generator.code import generator_of
from registry.errors import StoreNotFound
from registry.records import NewGenerator
from registry.tables.bundles import BundleImport, ImportedTask, ImportOutcome

if TYPE_CHECKING:
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.bundle.file import BundleFile
    from icmlora.bundle.index import BundledTask, BundleIndex
    from registry.store import Store

_BATCH_BYTES = 64 << 20
_MOST_TRIED = 64 << 20
"""Values of an adapter that is written for trial: a forged bundle is not to take memory before anybody asks for it."""


@dataclass(frozen=True)
class ImportReport:
    """What was imported, or would be."""

    index: BundleIndex
    digest: str  # SHA-256 that identifies the whole bundle
    tasks: tuple[ImportOutcome, ...]  # what became of each task: `added`, `encoded`, `known` or `skipped`
    refused: Mapping[str, str]  # task -> why its adapter cannot be written; the others are imported


@use_case
def import_bundle(
    context: Context,
    file: str | Path,
    tasks: Sequence[str] = (),
    *,
    on_conflict: Literal["skip", "fail"] = "fail",
    dry_run: bool = False,
) -> ImportReport:
    """Take the generator, codes and tasks of a bundle into the store, which is created if necessary.

    Args:
        context: The store.
        file: The bundle.
        tasks: Tasks of the bundle; all by default.
        on_conflict: If the store has a task of that name with another adapter or code: `skip` or `fail`.
        dry_run: Check everything and report what would change, but write nothing.

    Raises:
        BundleError: The bundle is damaged, cut short, or of another format.
        AdapterRefused: None of the tasks has an adapter that can be written.
        GeneratorConflict: The store uses another generator for this base model.
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
        arrival = _arrival(bundle, wanted, on_conflict)
        if dry_run:
            return ImportReport(index, bundle.digest, tuple(_plan(context, arrival)), refused)
        with context.open(create=True) as store:
            outcomes = store.bundles.plan(arrival)
            if _new(outcomes):
                # Not while a training holds the base model: its new generator would have no codes of these tasks.
                with store.job(store.base_models.name_of(index.base_model), shared=True):
                    new = _new(store.bundles.plan(arrival))  # again: the store may have changed during the wait
                    _put(context, store, bundle, [task for task in wanted if task.name.lower() in new])
                    # `add` decides once more under the write lock, since another process may have changed a task.
                    outcomes = store.bundles.add(arrival)
    return ImportReport(index, bundle.digest, tuple(outcomes), refused)


def _new(outcomes: Sequence[ImportOutcome]) -> set[str]:
    """Return the tasks that get something from the bundle."""
    return {outcome.name.lower() for outcome in outcomes if outcome.status in ("added", "encoded")}


def _check_parts(bundle: BundleFile, tasks: Sequence[BundledTask]) -> None:
    """Check what the file format does not: that every version opens, and that codes and configurations belong to it."""
    from icmlora.generator.versions import GeneratorFile

    generator_file = GeneratorFile(bundle.read(bundle.index.generator.blob))
    for number in range(len(generator_file.digests)):
        generator_file.codec(number)
    for task in tasks:
        if generator_of(bundle.read(task.code)) not in generator_file.digests:
            raise BundleError(f"the code of {task.name!r} belongs to another generator")
        check_companions(format_named(task.format), task.files)


def _refused(bundle: BundleFile, tasks: Sequence[BundledTask]) -> dict[str, str]:
    """Say which tasks have an adapter that cannot be written, and why."""
    refused: dict[str, AdapterRefused] = {}
    tried: set[tuple[object, ...]] = set()
    for task in tasks:
        form = task.format, task.config, task.layout, task.dtype, task.template, task.extras
        if form in tried:  # most of a fleet have one form
            continue
        try:
            _try_form(bundle, task)
        except UnsafeInput:
            raise
        except AdapterRefused as error:
            refused[task.name] = error
        else:
            tried.add(form)
    if tasks and len(refused) == len(tasks):
        name, first = next(iter(refused.items()))
        raise AdapterRefused(f"task {name!r}: {first.message}", kind=first.kind, hint=first.hint)
    return {name: why.message for name, why in refused.items()}


def _try_form(bundle: BundleFile, task: BundledTask) -> None:
    """Write an adapter of zeros in the form of a task's original: what a decoded one will be written in.

    One of more than `_MOST_TRIED` values is not tried; its faults show when it is written.

    Raises:
        AdapterRefused: Its configuration, or what is noted of its form, is damaged or does not fit it.
    """
    known, config = format_named(task.format), bundle.read(task.config)
    known.read_config(config)  # it may name a mirror of the base model
    template = Template(config, task.layout, task.dtype, task.template)
    if task.format == PEFT.name:
        AdapterConfig.parse(converted_form(template).config)
    if task.parameters + sum(extra.size for extra in task.extras) > _MOST_TRIED:
        return
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.formats.factors import fitted

    first = task.layout[0]  # formats make zeros of the modules that an adapter lacks, but there is none without any
    zeros = LoraModule(first.module, *fitted(None, first.rank, first.inputs, first.outputs))
    adapter = Adapter(bundle.index.base_model, None, (), (zeros,))
    packed = [(extra, bundle.read(extra.part)) for extra in task.extras if extra.file is None]
    if any(data.startswith(REFERENCES) for _, data in packed):  # it is written with tensors of its base model
        return
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


def _plan(context: Context, arrival: BundleImport) -> list[ImportOutcome]:
    try:
        with context.open(read_only=True) as store:
            return store.bundles.plan(arrival)
    except StoreNotFound:
        return [ImportOutcome(task.name, "added") for task in arrival.tasks]


def _put(context: Context, store: Store, bundle: BundleFile, tasks: Sequence[BundledTask]) -> None:
    """Store the parts that some tasks need, a few at a time."""
    if not tasks:
        return
    digests = list(dict.fromkeys([bundle.index.generator.blob, *(part for task in tasks for part in task.parts)]))
    batch: list[bytes] = []
    for done, digest in enumerate(digests, 1):
        batch.append(bundle.read(digest))
        if done == len(digests) or sum(map(len, batch)) >= _BATCH_BYTES:
            store.blobs.put_all(batch)
            batch = []
            context.progress(done, len(digests))


def _arrival(bundle: BundleFile, tasks: Sequence[BundledTask], on_conflict: Literal["skip", "fail"]) -> BundleImport:
    index = bundle.index
    generator = NewGenerator(index.base_model, index.generator.blob, index.generator.config, index.generator.metrics)
    arriving = [
        ImportedTask(
            task.name,
            bundled_adapter(task, bundle),
            task.weights_size,
            task.code,
            None,
            claim_of(task),
            bundled_vectors(task, bundle),
        )
        for task in tasks
    ]
    return BundleImport(generator, index.generator.version, arriving, on_conflict)
