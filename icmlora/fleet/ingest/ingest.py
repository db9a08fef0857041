"""Ingest adapters: find them, check them, store their bytes, then publish them.

    find     paths -> tasks, named, in batches
    prepare  files -> checked in memory -> blobs, durable        (icmlora.fleet.ingest.files)
    record   one transaction per batch -> manifests              (icmlora.fleet.ingest.record)
    extract  task vectors of the new tasks, if the base model is on this machine

A refused input goes into the report and never stops the others, except with `strict`, which checks everything first.
Recorded batches stay; running the same ingest again records only the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.base_models.finding.labels import typed_label
from icmlora.errors import AdapterRefused, Cancelled, IcmLoraError, OptionsConflict, UnsafeInput
from icmlora.fleet.bases.joins import KnownBases
from icmlora.fleet.context import Context, Event, Progress, StageBegun, has_loaders, reporting, use_case
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.ingest.duplicates import KnownTensors
from icmlora.fleet.ingest.extraction import extract, note_missing_vectors
from icmlora.fleet.ingest.extras import ExtrasKeeper
from icmlora.fleet.ingest.files import PreparedTask, Refusal, batches, prepare
from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.fleet.ingest.record import OnConflict, Outcome, record
from icmlora.fleet.ingest.report import IngestReport, InputProblem, PlaceholderMet, TaskIngested
from icmlora.formats.discovery.discovery import Discovery, find_tasks, name_tasks, no_adapter
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.discovery.naming import NameTemplate
from icmlora.formats.discovery.pickled import PickleReader, converted
from icmlora.io.files import read_regular
from icmlora.io.safetensors import ITEM_BYTES, MAX_FILE_BYTES
from registry.errors import DamagedStore, MissingBlob, SourceRefused, StoreNotFound, TaskConflict
from registry.manifests import Adapter, Task
from registry.names import UNKNOWN_BASE, source_label
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from registry.store import Store


@use_case
def ingest(
    context: Context,
    paths: Sequence[str | Path],
    *,
    name: str | None = None,
    name_from: str | None = None,
    samples: str | Path | None = None,
    base_model: str | None = None,
    texts: bool = True,
    strict: bool = False,
    on_conflict: Literal["version", "skip", "fail"] | None = None,
    restore: bool = False,
    read_bin: bool = False,
    initial: str | Path | None = None,
    vectors: bool = True,
    device: str = "auto",
    dry_run: bool = False,
) -> IngestReport:
    """Ingest adapters into the store, which is created if necessary. Ingesting the same again changes nothing.

    Refused inputs are in the report's `problems` and do not stop the rest. A base model under a new label, such as a
    known mirror, is joined to the base model in the store; these labels are in `joined`.

    Args:
        context: The store.
        paths: Adapters in any format of `icm convert --list-formats`, training runs with checkpoint-N folders, or
            folders of those at any depth.
        name: Name for the task, if exactly one is found. By default a task is named after its folder.
        name_from: Pattern for the names, such as `{parent}-{name}`; see `icm ingest --help`.
        samples: Samples for the task as JSON lines, if exactly one is found. By default the `samples.jsonl` next
            to its adapter.
        base_model: Base model of the adapters that name none. A task that was ingested without one gets it.
        texts: Also ingest the `samples.jsonl` and `eval.jsonl` found next to adapters.
        strict: Check everything first, and store nothing if any input is refused.
        on_conflict: If the store has a task of that name with another adapter: add a `version`, `skip` or `fail`. By
            default, add a version if the adapter is from the same folder, and fail otherwise.
        restore: Store evicted originals again. By default they stay evicted.
        read_bin: Also read weights that are a pickle, `adapter_model.bin`, in a process of its own with limits;
            the store keeps them as safetensors.
        initial: Folder with the initial weights of a PiSSA, OLoRA or CorDA adapter. By default `pissa_init`,
            `olora_init` or `corda_init` in or next to its folder.
        vectors: Also extract task vectors if the base model is on this machine. Failures are in the report's
            `vectors`, and the adapters stay.
        device: Where to extract task vectors.
        dry_run: Check everything and report the changes, but write nothing.

    Raises:
        OptionsConflict: Both `name` and `name_from` are given.
        AdapterRefused: Nothing was found, or everything was refused; with `strict`, an input was refused.
        TaskConflict: The same, because a task has another adapter in the store.
    """
    if name is not None and name_from is not None:
        raise OptionsConflict("--name and --name-from cannot be used together")
    folder = None if initial is None else Path(initial).resolve()
    found = _find([Path(path) for path in paths], name, samples, texts=texts, read_bin=read_bin, initial=folder)
    request = _Request(
        found,
        is_named=name is not None,
        pattern=None if name_from is None else NameTemplate(name_from),
        told=None if base_model is None else typed_label(base_model),
        on_conflict=on_conflict,
        restore=restore,
    )
    not_kept = Counter(source_label(Path(path.name)) for task in found.tasks for path in task.not_kept)
    report = IngestReport(found=len(found.tasks), not_kept=dict(sorted(not_kept.items())))
    problems = _Problems(context, report)
    with reporting(report):
        if strict:
            _check_all(context, request)
        extractable = _take(context, request, problems, dry_run=dry_run)
        if not report.ingested:
            problems.raise_first("nothing was ingested: all {count} inputs were refused")
        if vectors and extractable:
            context.on_event(StageBegun("task vectors", report))
            extract(context, report, extractable, device)
    return report


@dataclass(frozen=True)
class _Request:
    """The tasks that were found, and the options for all of them."""

    found: Discovery
    is_named: bool  # by the user, with the name of the only task
    pattern: NameTemplate | None
    told: str | None  # the base model of image adapters, and of others that name none
    on_conflict: OnConflict | None
    restore: bool


class _Problems:
    """Adds refused inputs to a report."""

    def __init__(self, context: Context, report: IngestReport) -> None:
        self._context, self.report = context, report
        self._first: Exception | None = None

    def add(self, error: Exception, path: Path, task: str | None = None) -> None:
        """Report an error. `path` is used if the error does not name a closer one."""
        self._first = self._first or error
        kind = getattr(error, "kind", "conflict" if isinstance(error, TaskConflict) else "unreadable")
        message = str(getattr(error, "message", error))
        where = source_label(Path(getattr(error, "path", None) or path))
        problem = InputProblem(where, str(kind), message, getattr(error, "hint", None), task)
        self.report.problems.append(problem)
        self._context.on_event(problem)

    def raise_first(self, message: str) -> None:
        """Raise the error if there is one; if there are several, one with the exit code of the first."""
        problems = self.report.problems
        if self._first is None:
            return
        if len(problems) == 1:
            raise self._first
        kind = UnsafeInput if isinstance(self._first, UnsafeInput | SourceRefused) else AdapterRefused
        raise kind(message.format(count=len(problems)), kind=problems[0].kind)


def _find(
    paths: Sequence[Path],
    name: str | None,
    samples: str | Path | None,
    *,
    texts: bool,
    read_bin: bool,
    initial: Path | None,
) -> Discovery:
    found = find_tasks(paths, texts=texts, read_bin=read_bin, initial=initial)
    if not found.tasks and not found.refused and not found.stand_ins:
        raise no_adapter(paths)
    if found.tasks and name is not None:
        found = replace(found, tasks=name_tasks(found.tasks, name=name))
    if samples is None:
        return found
    if len(found.tasks) != 1:
        fact = f"--samples is for one task, but {len(found.tasks)} were found"
        raise AdapterRefused(fact, kind="samples", path=samples, hint="specify the folder of a single task")
    return replace(found, tasks=(replace(found.tasks[0], samples=Path(samples)),))


def _check_all(context: Context, request: _Request) -> None:
    """Make a dry run, and raise if any input is refused."""

    def only_progress(event: Event) -> None:
        if isinstance(event, Progress | InputProblem):
            context.on_event(event)

    checking = replace(context, on_event=only_progress)
    problems = _Problems(checking, IngestReport(found=len(request.found.tasks)))
    _take(checking, request, problems, dry_run=True)
    problems.raise_first("nothing was ingested: {count} inputs were refused, and --strict allows none")


def _take(context: Context, request: _Request, problems: _Problems, *, dry_run: bool) -> dict[str, str]:
    """Ingest the tasks that were found; return those to extract vectors of, as `note_missing_vectors` does."""
    report, found = problems.report, request.found
    for refusal in found.refused:
        problems.add(refusal, Path(refusal.path or "."))
    for item in found.stand_ins:
        report.placeholders.append(PlaceholderMet(source_label(item.path), item.placeholder.task, item.passed_over))
        context.on_event(report.placeholders[-1])
    if not found.tasks:  # so no store is created
        return {}
    with _open(context, dry_run=dry_run) as store:
        known = KnownTasks(store)
        tasks = found.tasks
        if not request.is_named:
            # With `--on-conflict`, a task of the same name from another folder is the same task, trained again.
            is_same = request.on_conflict not in (None, "fail")
            tasks = name_tasks(tasks, known=known, pattern=request.pattern, same_name_is_same_task=is_same)
        batch = _Batches(context, request, problems, store, known, dry_run=dry_run)
        done, total = 0, sum(len(task.adapters) for task in tasks)
        context.progress(done, total)
        try:
            with PickleReader() as reader:
                for some in batches(tasks):
                    batch.ingest(some, reader)
                    done += sum(len(task.adapters) for task in some)
                    context.progress(done, total, some[-1].name)
        except Cancelled:
            note_missing_vectors(store, report)
            raise
        report.lookalikes = batch.bases.lookalikes()
        return note_missing_vectors(store, report)


@contextmanager
def _open(context: Context, *, dry_run: bool) -> Iterator[Store | None]:
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


class _Batches:
    """Ingests tasks, a batch at a time; `store` is None if it does not exist, and nothing is written in a dry run."""

    def __init__(
        self,
        context: Context,
        request: _Request,
        problems: _Problems,
        store: Store | None,
        known: KnownTasks,
        *,
        dry_run: bool,
    ) -> None:
        self._context, self._request, self._problems = context, request, problems
        self._store, self._known = store, known
        self._target = None if dry_run else store  # where blobs and manifests are written
        self.bases = KnownBases(context, store, dry_run=dry_run)
        self._extras = ExtrasKeeper(self.bases, self._target)
        self._tensors = KnownTensors(known, None if store is None else store.blobs.read)
        problems.report.joined = self.bases.joined

    def ingest(self, batch: Sequence[FoundTask], reader: PickleReader) -> None:
        """Check tasks, store their files, publish them in one transaction, and report each."""
        found = self._known.tasks(task.name for task in batch)
        known = {name: task for name, task in found.items() if isinstance(task, Task)}
        problems: list[tuple[Exception, Path, str | None]] = []
        with converted(batch, reader) as (readable, refused):
            for task in list(readable):
                if isinstance(damage := found.get(task.name.lower()), DamagedStore):
                    problems.append((damage, task.folder, None))
                    readable.remove(task)
            evicted = {} if self._request.restore or self._target is None else known
            try:
                prepared = self._prepared(readable, known, evicted, refused)
                outcomes = self._recorded(prepared, known, evicted)
            except MissingBlob:
                # Weights were not stored because they were evicted, but their task needs them now: store everything.
                prepared = self._prepared(readable, known, {}, refused)
                outcomes = self._recorded(prepared, known, {})
        for item in prepared:
            if isinstance(item, Refusal):
                problems.append((item.error, item.path, None))
                continue
            outcome = outcomes[item.task.name]
            if isinstance(outcome, TaskConflict):
                problems.append((outcome, item.found.folder, None))
            else:
                self._report(item, outcome)
            name = None if isinstance(outcome, TaskConflict) else outcome.name
            problems += [(problem.error, problem.path, name) for problem in item.problems]
        for problem in sorted(problems, key=lambda problem: str(problem[1])):
            self._problems.add(*problem)

    def _prepared(
        self,
        tasks: Sequence[FoundTask],
        known: Mapping[str, Task],
        evicted: Mapping[str, Task],
        refused: Mapping[Path, IcmLoraError],
    ) -> list[PreparedTask | Refusal]:
        """Store the files of tasks, find their base models, then keep their extras, which may refer to these."""
        prepared = prepare(tasks, self._target, evicted, refused, any_row=has_loaders())
        labels = {item.task.base_model for item in prepared if isinstance(item, PreparedTask)}
        self.bases.join_labels(labels if self._request.told is None else {*labels, self._request.told})
        return self._extras.keep([self._with_base(item) for item in prepared], known)

    def _with_base(self, item: PreparedTask | Refusal) -> PreparedTask | Refusal:
        """Find the base model of a task; the user specifies it for image adapters, and for others that name none."""
        if isinstance(item, Refusal):
            return item
        told, label, final = self._request.told, item.task.base_model, item.found.final
        if label == UNKNOWN_BASE or (told is not None and final.format.is_for_images):
            task = replace(item.task, base_model=told or UNKNOWN_BASE)
            item = replace(item, task=task, base_is_told=told is not None, base_is_guess=False)
        elif told is not None and self.bases.name_of(told) != self.bases.name_of(label):
            alias = f"run `icm base alias {told} {label}` if they are the same model"
            hint = f"{alias}; otherwise ingest it without --base-model"
            error = AdapterRefused(f"it was trained for {label!r}, not for {told!r}", kind="base-model", hint=hint)
            return Refusal(error, item.found.folder)
        if final.format.name == "gguf" and item.task.base_model != UNKNOWN_BASE:
            from icmlora.formats.pairs.gguf import architecture_of

            try:
                architecture = architecture_of(read_regular(final.weights, max_bytes=MAX_FILE_BYTES))
                self.bases.check_gguf(item.task.base_model, architecture)
            except AdapterRefused as refusal:
                return Refusal(refusal, final.weights)
        return item

    def _recorded(
        self, items: Sequence[PreparedTask | Refusal], known: Mapping[str, Task], evicted: Mapping[str, Task]
    ) -> dict[str, Outcome | TaskConflict]:
        """Publish tasks in one transaction, without decoded copies and conflicts; return all outcomes by name."""
        good = [item for item in items if isinstance(item, PreparedTask)]
        outcomes: dict[str, Outcome | TaskConflict] = {}
        changed = list[Adapter]()
        for item in good:
            present = known.get(item.task.name.lower())
            if present is None or (present.final.weights, present.final.config) != _files(item.task.final):
                changed.append(item.task.final)
                if present is not None and self._is_decoded(present, item.task.final):
                    count = len(item.task.adapters)
                    more = present.base_model, present.version
                    outcomes[item.task.name] = Outcome(present.name, "decoded", 0, count, *more)
        self._tensors.look_up(changed)
        offers = [item for item in good if item.task.name not in outcomes]
        made = record(
            self._store,
            offers,
            known,
            on_conflict=self._request.on_conflict,
            restore=self._request.restore,
            withheld={str(one.weights) for task in evicted.values() for one in task.adapters if one.is_evicted},
            dry_run=self._target is None,
        )
        return outcomes | dict(zip((item.task.name for item in offers), made, strict=True))

    def _is_decoded(self, known: Task, final: Adapter) -> bool:
        """Return whether an adapter is a decoded copy of an evicted one, as `icm restore` writes it.

        Ingesting it would replace the original with its lossy copy.
        """
        if self._store is None or known.code is None or not known.final.is_evicted:
            return False
        from icmlora.fleet.resources.decoding import files_of_code  # imports torch; few tasks come here

        try:
            generator = self._context.generator.get(known.code.generator, self._store.blobs.read)
            made = files_of_code(self._store, generator, known)
        except FAILURES:
            return False
        return (digest_of(made.weights), digest_of(made.config)) == _files(final)

    def _report(self, item: PreparedTask, outcome: Outcome) -> None:
        final, base = item.task.final, self.bases.name_of(outcome.base_model)
        is_new = outcome.status in ("added", "version")
        named = replace(item.task, name=outcome.name, base_model=base)
        ingested = TaskIngested(
            task=outcome.name,
            status=outcome.status,
            new=outcome.new,
            known=outcome.known,
            size=item.size,
            evicted=outcome.evicted,
            restored=outcome.restored,
            samples=item.samples_read,
            eval_data=item.eval_read,
            folder=source_label(item.found.folder),
            is_renamed=not item.found.is_called_like_its_folder(outcome.name),
            base_model=base,
            base_is_guess=item.base_is_guess and is_new,
            original_only=named.not_encodable,
            extras_size=final.extras_bytes,
            lora_size=_lora_size(final),
            converted_from=item.found.final.pickle,
            initial=None if item.found.final.initial is None else source_label(item.found.final.initial.parent),
            format=final.format,
            wrapper=item.wrapper,
            same_as=self._tensors.add(named) if is_new else None,
            same_as_final=self._tensors.same_as_final(named),
            version=outcome.version,
        )
        self._problems.report.ingested.append(ingested)
        self._context.on_event(ingested)


def _files(adapter: Adapter) -> tuple[str, str]:
    return adapter.weights, adapter.config


def _lora_size(final: Adapter) -> int:
    if final.original_only is not None:
        return 0
    return final.parameters * max((ITEM_BYTES.get(dtype, 4) for dtype in final.dtype.split("+")), default=4)
