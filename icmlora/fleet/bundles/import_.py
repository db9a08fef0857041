"""Import the generator, codes and tasks of a bundle into a store. The originals are not in a bundle.

    bundle --check every byte--> decide --> blobs, durable --> publish: generator and tasks together

Until then the store is as it was. A killed import leaves blobs that nothing refers to, which `icm prune` removes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.bundle.file import open_bundle
from icmlora.bundle.index import blobs_of, imported
from icmlora.errors import AdapterRefused, BundleError, DataError, UnsafeInput
from icmlora.fleet.bases.labels import renumbered
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.resources.bundle_codes import check_vectors, find_task
from icmlora.fleet.resources.decoding import template_of
from icmlora.formats.base_references import REFERENCES
from icmlora.formats.catalogue import format_named
from icmlora.formats.extras import unpack_tensors, unpacked_size
from icmlora.formats.format import check_companions
from icmlora.formats.peft.config import AdapterConfig
from icmlora.formats.peft.initial import converted_form
from icmlora.formats.peft.peft import PEFT
from icmlora.generator.codec.code import generator_of
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
_MOST_TRIED = 64 << 20
"""Values of an adapter that is written for trial: a forged bundle is not to take memory before anybody asks for it."""


ImportStatus = Literal["added", "encoded", "known", "skipped"]


@dataclass(frozen=True)
class ImportOutcome:
    """The result for a task of a bundle."""

    name: str  # as the store spells it
    status: ImportStatus  # `encoded`: the store had its adapter, and has its code now


@dataclass(frozen=True)
class ImportReport:
    """The imported tasks, or those that would be imported."""

    index: BundleIndex
    digest: str  # SHA-256 that identifies the whole bundle
    tasks: tuple[ImportOutcome, ...]
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
    """Import the generator, codes and tasks of a bundle into the store, which is created if necessary.

    Args:
        context: The store.
        file: The bundle.
        tasks: Tasks of the bundle; all by default.
        on_conflict: If the store has a task of that name with another adapter or code: `skip` or `fail`.
        dry_run: Check everything and report what would change, but write nothing.

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
        if dry_run:
            outcomes = _plan(context, bundle, wanted, on_conflict)
        else:
            with context.open(create=True) as store:
                outcomes = _import(context, store, bundle, wanted, on_conflict)
    return ImportReport(index, bundle.digest, tuple(outcomes), refused)


def _import(
    context: Context, store: Store, bundle: BundleFile, tasks: Sequence[Task], on_conflict: Literal["skip", "fail"]
) -> list[ImportOutcome]:
    stored = set[str]()
    while True:
        decided = _decide(store, bundle, tasks, on_conflict)
        new = [state for _, state in decided if state is not None]
        if new:
            names = {outcome.name.lower() for outcome, state in decided if state is not None}
            _put(context, store, bundle, [task for task in tasks if task.name.lower() in names - stored])
            stored |= names
            try:
                store.publish([*_generators(store, bundle), *new])
            except (LostRace, TaskConflict):  # another process changed or added one of them
                continue
        _restore(store, bundle, [outcome.name for outcome, state in decided if state is None])
        return [outcome for outcome, _ in decided]


def _restore(store: Store, bundle: BundleFile, names: Sequence[str]) -> None:
    """Store blobs of known tasks and their generators that the store has lost."""
    states: list[State] = [*map(store.task, names), *store.generators(store.base_name(bundle.index.base_model))]
    needed = {str(file) for state in states for _, file in files_of(encode(state).body)}
    parts = {str(part) for part in bundle.index.parts}
    store.blobs.put_all([bundle.read(digest) for digest in sorted(needed & parts) if not store.blobs.exists(digest)])


def _decide(
    store: Store | None, bundle: BundleFile, tasks: Sequence[Task], on_conflict: Literal["skip", "fail"]
) -> list[tuple[ImportOutcome, State | None]]:
    """Return the outcome for each task, and the state to publish."""
    label, moment, source = bundle.index.base_model, now(), bundle_source(bundle.digest)
    base = label if store is None else store.base_name(label)
    decided: list[tuple[ImportOutcome, State | None]] = []
    for task in tasks:
        known = None if store is None else store.find(task.name)
        if known is None:
            alias = None if base == label else label
            new = imported(task, source=source, base_model=base, label=alias, moment=moment)
            decided.append((ImportOutcome(task.name, "added"), new))
            continue
        is_same = known.base_model == base and (known.final.weights, known.final.config) == (
            task.final.weights,
            task.final.config,
        )
        if is_same and known.code is None:
            decided.append((ImportOutcome(known.name, "encoded"), replace(known, code=task.code)))
        elif is_same and known.code is not None and task.code is not None and known.code.blob == task.code.blob:
            decided.append((ImportOutcome(known.name, "known"), None))
        elif on_conflict == "fail":
            raise TaskConflict(known.name, choices="skip")
        else:
            decided.append((ImportOutcome(known.name, "skipped"), None))
    return decided


def _generators(store: Store, bundle: BundleFile) -> list[State]:
    """Return the states that add the generator of a bundle; it is in use only if its base model had none."""
    generator = bundle.index.generator
    base = store.base_name(generator.base_model)
    if any(one.blob == generator.blob for one in store.generators(base)):
        return []
    current = store.generator(base)
    new = replace(generator, base_model=base, created_at=now(), manifest=None)
    return [new] if current is None else list(renumbered(store, base, [new], current, current))


def _check_parts(bundle: BundleFile, tasks: Sequence[Task]) -> None:
    """Check what the file format does not: that every version opens, and that codes and configurations belong to it."""
    from icmlora.generator.codec.generator_file import GeneratorFile

    generator_file = GeneratorFile(bundle.read(bundle.index.generator.blob))
    for number in range(len(generator_file.digests)):
        generator_file.codec(number)
    for task in tasks:
        assert task.code is not None  # as every task of a bundle has
        if generator_of(bundle.read(task.code.blob)) not in generator_file.digests:
            raise BundleError(f"the code of {task.name!r} belongs to another generator")
        files = [extra.file for extra in task.final.extras if extra.file is not None]
        check_companions(format_named(task.final.format), files)
        check_vectors(task, bundle)


def _refused(bundle: BundleFile, tasks: Sequence[Task]) -> dict[str, str]:
    """Return task -> why its adapter cannot be written."""
    refused: dict[str, AdapterRefused] = {}
    tried: set[tuple[object, ...]] = set()
    for task in tasks:
        final = task.final
        form = final.format, final.config, final.layout, final.dtype, final.template, str(final.extras)
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


def _try_form(bundle: BundleFile, task: Task) -> None:
    """Write an adapter of zeros in the form of a task's original: what a decoded one will be written in.

    One of more than `_MOST_TRIED` values is not tried; its faults show when it is written.

    Raises:
        AdapterRefused: Its configuration or recorded form is damaged or does not fit it.
    """
    final = task.final
    known, config = format_named(final.format), bundle.read(final.config)
    known.read_config(config)  # it may name a mirror of the base model
    template = template_of(final, config)
    if final.format == PEFT.name:
        AdapterConfig.parse(converted_form(template).config)
    if final.parameters + sum(extra.size for extra in final.extras) > _MOST_TRIED:
        return
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.formats.factors import fitted

    first = template.layout[0]  # formats make zeros of the modules that an adapter lacks, but there is none without any
    zeros = LoraModule(first.module, *fitted(None, first.rank, first.inputs, first.outputs))
    adapter = Adapter(bundle.index.base_model, None, (), (zeros,))
    packed = [(extra, bundle.read(extra.blob)) for extra in final.extras if extra.file is None]
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


def _plan(
    context: Context, bundle: BundleFile, tasks: Sequence[Task], on_conflict: Literal["skip", "fail"]
) -> list[ImportOutcome]:
    try:
        with context.open(read_only=True) as store:
            return [outcome for outcome, _ in _decide(store, bundle, tasks, on_conflict)]
    except StoreNotFound:
        return [outcome for outcome, _ in _decide(None, bundle, tasks, on_conflict)]


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
