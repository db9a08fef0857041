"""Check and record the tasks that were found, a batch at a time.

    check    files -> checked in memory -> blobs, durable        (icmlora.fleet.ingest.files)
    record   one transaction per batch -> manifests              (icmlora.fleet.ingest.record)

A refused input goes into the report and never stops the others. Recorded batches stay; running the same ingest again
records only the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, Cancelled, IcmLoraError
from icmlora.fleet.bases.joins import KnownBases
from icmlora.fleet.context import Context, has_loaders
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.ingest.duplicates import KnownTensors
from icmlora.fleet.ingest.extraction import note_missing_vectors
from icmlora.fleet.ingest.extras import ExtrasKeeper
from icmlora.fleet.ingest.files import PreparedTask, Refusal, batches, check_files
from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.fleet.ingest.record import record
from icmlora.fleet.ingest.report import IngestReport, InputProblem, OnConflict, PlaceholderMet, TaskIngested
from icmlora.formats.discovery.discovery import Discovery, name_tasks
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.discovery.naming import NameTemplate
from icmlora.formats.discovery.pickled import PickleReader, converted
from icmlora.formats.pairs.gguf import architecture_of
from icmlora.io.files import read_regular
from icmlora.io.safetensors import ITEM_BYTES, MAX_FILE_BYTES
from registry.errors import DamagedStore, MissingBlob, StoreNotFound, TaskConflict
from registry.manifests import StoredAdapter, Task
from registry.names import UNKNOWN_BASE, source_label
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from registry.store import Store


@contextmanager
def _opened(context: Context, *, dry_run: bool) -> Iterator[Store | None]:
    """Open the store for writing. A dry run opens it for reading, and yields None if it does not exist."""
    try:
        store = context.open(create=not dry_run, read_only=dry_run)
    except StoreNotFound:
        from registry.storage.folder import check_place

        if not isinstance(context.address, Path):
            raise
        check_place(context.path)
        yield None
        return
    with store:
        yield store


@dataclass
class Ingestion:
    """Ingests tasks, a batch at a time; a dry run writes nothing."""

    context: Context
    report: IngestReport
    is_named: bool  # by the user, with the name of the only task
    pattern: NameTemplate | None
    named_base: str | None  # the base model of image adapters, and of others that name none
    on_conflict: OnConflict | None
    restore: bool
    dry_run: bool

    def run(self, found: Discovery) -> dict[str, str]:
        """Ingest the tasks that were found; return those to extract vectors of, as `note_missing_vectors` does."""
        for refusal in found.refused:
            self._refuse(refusal, Path(refusal.path or "."))
        for item in found.stand_ins:
            met = PlaceholderMet(source_label(item.path), item.placeholder.task, item.passed_over)
            self.report.placeholders.append(met)
            self.context.on_event(met)
        if not found.tasks:  # so no store is created
            return {}
        with _opened(self.context, dry_run=self.dry_run) as store:
            self._store = store  # None if it does not exist
            self._target = None if self.dry_run else store  # where blobs and manifests are written
            self._known = KnownTasks(store)
            self._bases = KnownBases(self.context, store, dry_run=self.dry_run)
            self._extras = ExtrasKeeper(self._bases, self._target)
            self._tensors = KnownTensors(self._known, None if store is None else store.blobs.read)
            self.report.joined = self._bases.joined
            tasks = found.tasks
            if not self.is_named:
                # With `--on-conflict`, a task of the same name from another folder is the same task, trained again.
                is_same = self.on_conflict not in (None, "fail")
                tasks = name_tasks(tasks, known=self._known, pattern=self.pattern, same_name_is_same_task=is_same)
            done, total = 0, sum(len(task.adapters) for task in tasks)
            self.context.progress(done, total)
            try:
                with PickleReader() as reader:
                    for batch in batches(tasks):
                        self._ingest(batch, reader)
                        done += sum(len(task.adapters) for task in batch)
                        self.context.progress(done, total, batch[-1].name)
            except Cancelled:
                note_missing_vectors(store, self.report)
                raise
            self.report.lookalikes = self._bases.lookalikes()
            return note_missing_vectors(store, self.report)

    def _refuse(self, error: Exception, path: Path, task: str | None = None) -> None:
        """Report an error. `path` is used if the error does not name a closer one."""
        kind = getattr(error, "kind", "conflict" if isinstance(error, TaskConflict) else "unreadable")
        message = str(getattr(error, "message", error))
        where = source_label(Path(getattr(error, "path", None) or path))
        self.report.errors.append(error)
        self.report.problems.append(InputProblem(where, str(kind), message, getattr(error, "hint", None), task))
        self.context.on_event(self.report.problems[-1])

    def _ingest(self, batch: Sequence[FoundTask], reader: PickleReader) -> None:
        """Check tasks, store their files, publish them in one transaction, and report each."""
        found = self._known.tasks(task.name for task in batch)
        known = {name: task for name, task in found.items() if isinstance(task, Task)}
        damaged = {name: task for name, task in found.items() if isinstance(task, DamagedStore)}
        problems: list[tuple[Exception, Path, str | None]] = []
        with converted(batch, reader) as (readable, refused):
            problems += [
                (damaged[key], task.folder, None) for task in readable if (key := task.name.lower()) in damaged
            ]
            readable = [task for task in readable if task.name.lower() not in damaged]
            try:
                evicted = {} if self.restore or self._target is None else known
                prepared = self._check(readable, known, evicted, refused)
                results = self._record(prepared, known, evicted)
            except MissingBlob:
                # Weights were not stored because they were evicted, but their task needs them now: store everything.
                prepared = self._check(readable, known, {}, refused)
                results = self._record(prepared, known, {})
        for item in prepared:
            if isinstance(item, Refusal):
                problems.append((item.error, item.path, None))
                continue
            result, name = results[item.task.name], None
            if isinstance(result, TaskConflict):
                problems.append((result, item.found.folder, None))
            else:
                name = result.task
                self._report_task(item, result)
            problems += [(problem.error, problem.path, name) for problem in item.problems]
        for problem in sorted(problems, key=lambda problem: str(problem[1])):
            self._refuse(*problem)

    def _check(
        self,
        tasks: Sequence[FoundTask],
        known: Mapping[str, Task],
        evicted: Mapping[str, Task],
        refused: Mapping[Path, IcmLoraError],
    ) -> list[PreparedTask | Refusal]:
        """Store the files of tasks, find their base models, then keep their extras, which may refer to these."""
        checked = check_files(tasks, self._target, evicted, refused, any_row=has_loaders())
        labels = {item.task.base_model for item in checked if isinstance(item, PreparedTask)}
        self._bases.join_labels(labels if self.named_base is None else {*labels, self.named_base})
        return self._extras.keep(
            [item if isinstance(item, Refusal) else self._with_base(item) for item in checked], known
        )

    def _with_base(self, item: PreparedTask) -> PreparedTask | Refusal:
        """Find the base model of a task; the user specifies it for image adapters, and for others that name none."""
        named_base, label, final = self.named_base, item.task.base_model, item.found.final
        if label == UNKNOWN_BASE or (named_base is not None and final.format.is_for_images):
            task = replace(item.task, base_model=named_base or UNKNOWN_BASE)
            item = replace(item, task=task, base_is_named=named_base is not None, base_is_guess=False)
        elif named_base is not None and self._bases.name_of(named_base) != self._bases.name_of(label):
            alias = f"run `icm base alias {named_base} {label}` if they are the same model"
            hint = f"{alias}; otherwise ingest it without --base-model"
            error = AdapterRefused(
                f"it was trained for {label!r}, not for {named_base!r}", kind="base-model", hint=hint
            )
            return Refusal(error, item.found.folder)
        if final.format.name == "gguf" and item.task.base_model != UNKNOWN_BASE:
            try:
                architecture = architecture_of(read_regular(final.weights, max_bytes=MAX_FILE_BYTES))
                self._bases.check_gguf(item.task.base_model, architecture)
            except AdapterRefused as refusal:
                return Refusal(refusal, final.weights)
        return item

    def _record(
        self, items: Sequence[PreparedTask | Refusal], known: Mapping[str, Task], evicted: Mapping[str, Task]
    ) -> dict[str, TaskIngested | TaskConflict]:
        """Publish tasks in one transaction, without decoded copies and conflicts; return all results by name."""
        results: dict[str, TaskIngested | TaskConflict] = {}
        offers: list[PreparedTask] = []
        changed: list[StoredAdapter] = []
        for item in items:
            if isinstance(item, Refusal):
                continue
            task, present = item.task, known.get(item.task.name.lower())
            if present is None or (present.final.weights, present.final.config) != _files(task.final):
                changed.append(task.final)
                if present is not None and self._is_decoded(present, task.final):
                    base, version, count = present.base_model, present.version, len(task.adapters)
                    done = TaskIngested(present.name, "decoded", 0, count, base_model=base, version=version)
                    results[task.name] = done
                    continue
            offers.append(item)
        self._tensors.look_up(changed)
        recorded = record(
            self._store,
            [item.task for item in offers],
            known,
            on_conflict=self.on_conflict,
            restore=self.restore,
            named_bases={item.task.name for item in offers if item.base_is_named},
            withheld={str(one.weights) for task in evicted.values() for one in task.adapters if one.is_evicted},
            dry_run=self._target is None,
        )
        return results | dict(zip((item.task.name for item in offers), recorded, strict=True))

    def _is_decoded(self, known: Task, final: StoredAdapter) -> bool:
        """Return whether an adapter is a decoded copy of an evicted one, as `icm restore` writes it.

        Ingesting it would replace the original with its lossy copy.
        """
        if self._store is None or known.code is None or not known.final.is_evicted:
            return False
        from icmlora.fleet.resources.decoding import files_of_code  # imports torch; few tasks come here

        try:
            generator = self.context.generator.get(known.code.generator, self._store.blobs.read)
            decoded = files_of_code(self._store, generator, known)
        except FAILURES:
            return False
        return (digest_of(decoded.weights), digest_of(decoded.config)) == _files(final)

    def _report_task(self, item: PreparedTask, result: TaskIngested) -> None:
        found, final, base = item.found, item.task.final, self._bases.name_of(result.base_model)
        is_new = result.status in ("added", "version")
        named = replace(item.task, name=result.task, base_model=base)
        files = sum(adapter.original_bytes for adapter in item.task.adapters)
        item_bytes = max((ITEM_BYTES.get(dtype, 4) for dtype in final.dtype.split("+")), default=4)
        result = replace(
            result,
            size=files + sum(extra.size for extra in final.extras if extra.file is not None),
            samples=item.samples_read,
            eval_data=item.eval_read,
            folder=source_label(found.folder),
            is_renamed=not found.is_called_like_its_folder(result.task),
            base_model=base,
            base_is_guess=item.base_is_guess and is_new,
            original_only=named.not_encodable,
            extras_size=final.extras_bytes,
            lora_size=final.parameters * item_bytes if final.original_only is None else 0,
            converted_from=found.final.pickle,
            initial=None if found.final.initial is None else source_label(found.final.initial.parent),
            format=final.format,
            wrapper=item.wrapper,
            same_as=self._tensors.add(named) if is_new else None,
            same_as_final=self._tensors.same_as_final(named),
        )
        self.report.done.append(result)
        self.context.on_event(result)


def _files(adapter: StoredAdapter) -> tuple[str, str]:
    return adapter.weights, adapter.config
