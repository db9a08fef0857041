"""Ingest adapters: find them, check them, store their bytes, then record them.

    plan     paths -> tasks, in batches
    put      files -> checked in memory -> blobs, durable        (icmlora.fleet.ingest.files)
    record   one transaction per batch -> rows
    extract  task vectors of the new tasks, where the base model is on this machine

What can be taken is taken: a refused input goes into the report and never stops the others, except with `strict`, which
checks everything first. Recorded batches stay; running the same ingest again records only what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.base_models.finding.labels import typed_label
from icmlora.errors import AdapterRefused, Cancelled, IcmLoraError, OptionsConflict, UnsafeInput
from icmlora.fleet.bases.joins import BaseJoined, KnownBases
from icmlora.fleet.context import Context, Event, Progress, StageBegun, current_code, reporting, use_case
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.ingest.duplicates import KnownTensors
from icmlora.fleet.ingest.extraction import extract, note_missing_vectors
from icmlora.fleet.ingest.extras import ExtrasKeeper
from icmlora.fleet.ingest.files import PreparedTask, Refusal, TextRead, batches, prepare
from icmlora.formats.discovery.discovery import Discovery, FoundTask, find_tasks, name_tasks, no_adapter
from icmlora.formats.discovery.naming import NameTemplate
from icmlora.formats.discovery.pickled import PickleReader, converted
from icmlora.io.files import read_regular
from icmlora.io.safetensors import ITEM_BYTES, MAX_FILE_BYTES
from registry.errors import MissingBlob, SourceRefused, StoreNotFound, TaskConflict
from registry.names import UNKNOWN_BASE, source_label
from registry.records import WITHOUT_BASE, IngestOutcome, NewAdapter, TaskIngest
from registry.storage.blobs.content import digest_of

if TYPE_CHECKING:
    from icmlora.fleet.vectors.vectors import VectorReport
    from registry.records import EvictedAdapter, TaskOrigin
    from registry.store import Store
    from registry.tables.origins import Origins

Conflict = Literal["skip", "replace", "fail"]


@dataclass(frozen=True)
class TaskIngested(Event):
    """A task is in the store now, or would be after a dry run."""

    task: str
    status: str  # `added`, `updated`, `known`, `replaced`, `skipped`, or `decoded` (it is what the task's code gives)
    new: int
    known: int
    size: int  # bytes of all its adapters' files
    evicted: int = 0
    restored: int = 0
    samples: TextRead | None = None
    eval_data: TextRead | None = None
    folder: str = ""  # what the task is named after
    is_renamed: bool = False  # it is called otherwise than the folder
    base_model: str = ""  # its name, whatever label the adapter gives it
    base_is_guess: bool = False  # the widths of its tensors make it likely, and nothing names it
    original_only: str | None = None  # why it can have no code
    extras_size: int = 0  # bytes that its extras take in the store; equal ones are stored once
    lora_size: int = 0  # bytes of the factors of its final adapter; 0 where there can be no code
    converted_from: str | None = None  # the name of the pickle that its weights were converted from
    initial: str | None = None  # the folder with the weights that it began with, which were taken off
    format: str = "peft"
    wrapper: str | None = None  # what a wrapper put into the names of its tensors, as `_orig_mod`; PEFT finds none then
    same_as: str | None = None  # another task whose final adapter has the same tensors, for a new adapter
    same_as_final: tuple[int, ...] = ()  # steps of the checkpoints whose tensors equal the final adapter's


@dataclass(frozen=True)
class InputProblem(Event):
    """An input that was not taken."""

    path: str
    kind: str
    message: str
    hint: str | None
    task: str | None = None  # the task that was taken without it, as without a damaged checkpoint


@dataclass(frozen=True)
class PlaceholderMet(Event):
    """A placeholder of `icm evict --placeholder` that was passed over: there is no adapter in its place."""

    path: str
    task: str  # the task that it names
    passed_over: int  # adapters of the same run that were not taken, because the final one is not there


@dataclass
class IngestReport:
    """What an ingest did."""

    found: int = 0
    # Labels of base models that were new to the store and are taken for another one.
    joined: list[BaseJoined] = field(default_factory=list)
    # Groups of base models whose names look alike, one of them new. They stay separate.
    lookalikes: list[list[str]] = field(default_factory=list)
    ingested: list[TaskIngested] = field(default_factory=list)
    problems: list[InputProblem] = field(default_factory=list)
    placeholders: list[PlaceholderMet] = field(default_factory=list)
    # Files next to adapters that belong to neither an adapter nor its trainer: name -> how many there are.
    not_kept: Mapping[str, int] = field(default_factory=dict)
    without_vectors: list[str] = field(default_factory=list)
    bases_not_found: list[str] = field(default_factory=list)  # base models of those tasks that are not on this machine
    vectors: VectorReport | None = None  # whose task vectors were extracted, and whose could not be

    @property
    def new(self) -> int:
        """Adapters that were recorded."""
        return sum(task.new for task in self.ingested)

    @property
    def known(self) -> int:
        """Adapters that the store already had."""
        return sum(task.known for task in self.ingested)

    @property
    def evicted(self) -> int:
        """Known adapters that stay evicted."""
        return sum(task.evicted for task in self.ingested)

    @property
    def restored(self) -> int:
        """Known adapters that were evicted and are back."""
        return sum(task.restored for task in self.ingested)

    @property
    def size(self) -> int:
        """Bytes of all adapters that were recorded or already known."""
        return sum(task.size for task in self.ingested)


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
    on_conflict: Conflict = "fail",
    restore: bool = False,
    read_bin: bool = False,
    initial: str | Path | None = None,
    vectors: bool = True,
    device: str = "auto",
    dry_run: bool = False,
) -> IngestReport:
    """Take adapters into the store, which is created if necessary. Ingesting the same again changes nothing.

    What cannot be taken is in the report's `problems` and does not stop the rest. A base model under a new label,
    such as a known mirror, is joined to the one that the store has; these labels are in `joined`.

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
        strict: Check everything first, and store nothing if anything cannot be taken.
        on_conflict: If the store has a task of that name with another adapter: `skip`, `replace` or `fail`.
        restore: Bring evicted originals back. By default they stay evicted.
        read_bin: Also read weights that are a pickle, `adapter_model.bin`, in a process of its own with limits;
            the store keeps them as safetensors.
        initial: Folder with the weights that a PiSSA, OLoRA or CorDA adapter began with. By default `pissa_init`,
            `olora_init` or `corda_init` in or next to its folder.
        vectors: Also extract task vectors where the base model is on this machine. What fails is in the report's
            `vectors`, and its adapters stay.
        device: Where to extract task vectors.
        dry_run: Check everything and report what would change, but write nothing.

    Raises:
        OptionsConflict: Both `name` and `name_from` are given.
        AdapterRefused: Nothing was found, or nothing could be taken; with `strict`, an input was refused.
        TaskConflict: The same, where a task has another adapter in the store and `on_conflict` is `fail`.
    """
    if name is not None and name_from is not None:
        raise OptionsConflict("--name and --name-from cannot be used together")
    folder = None if initial is None else Path(initial).resolve()
    found = _find([Path(path) for path in paths], name, samples, texts=texts, read_bin=read_bin, initial=folder)
    pattern = None if name_from is None else NameTemplate(name_from)  # refused before a store is made
    told = None if base_model is None else typed_label(base_model)

    def named(origins: Origins | None) -> Sequence[FoundTask]:
        # `--on-conflict` is for a task that was trained again elsewhere; without it, another folder is another task.
        is_same = on_conflict != "fail"
        return name_tasks(found.tasks, known=origins, pattern=pattern, same_name_is_same_task=is_same)

    as_found = None if name is not None else named
    take = partial(_take, found=found, named=as_found, told=told, on_conflict=on_conflict, restore=restore)
    not_kept = Counter(source_label(Path(path.name)) for task in found.tasks for path in task.not_kept)
    report = IngestReport(found=len(found.tasks), not_kept=dict(sorted(not_kept.items())))
    problems = _Problems(context, report)
    with reporting(report):
        if strict:
            _check_all(context, found, take)
        extractable = take(context, report, problems, dry_run=dry_run)
        if not report.ingested:
            problems.raise_first("nothing was ingested: all {count} inputs were refused")
        if vectors and extractable:
            context.on_event(StageBegun("task vectors", report))
            extract(context, report, extractable, device)
    return report


_Naming = Callable[["Origins | None"], Sequence[FoundTask]]


def _take(
    context: Context,
    report: IngestReport,
    problems: _Problems,
    *,
    found: Discovery,
    named: _Naming | None,
    told: str | None,
    on_conflict: Conflict,
    restore: bool,
    dry_run: bool,
) -> dict[str, str]:
    """Take what was found; return the tasks whose vectors could be extracted, as `note_missing_vectors` does."""
    for refusal in found.refused:
        problems.add(refusal, Path(refusal.path or "."))
    for item in found.stand_ins:
        report.placeholders.append(PlaceholderMet(source_label(item.path), item.placeholder.task, item.passed_over))
        context.on_event(report.placeholders[-1])
    if not found.tasks:  # so that no store is made for nothing
        return {}
    with _open_target(context, told, on_conflict, restore=restore, dry_run=dry_run) as target:
        report.joined = target.bases.joined
        tasks = found.tasks if named is None else named(target.origins)
        try:
            with PickleReader() as reader:
                _ingest_batches(context, tasks, target, reader, report, problems)
        except Cancelled:
            note_missing_vectors(target.store, report)
            raise
        report.lookalikes = target.bases.lookalikes()
        return note_missing_vectors(target.store, report)


def _check_all(context: Context, found: Discovery, take: Callable[..., dict[str, str]]) -> None:
    """Do what a dry run does, and raise if anything would not be taken."""

    def only_progress(event: Event) -> None:
        if isinstance(event, Progress | InputProblem):
            context.on_event(event)

    report = IngestReport(found=len(found.tasks))
    checking = replace(context, on_event=only_progress)
    problems = _Problems(checking, report)
    take(checking, report, problems, dry_run=True)
    problems.raise_first("nothing was ingested: {count} inputs were refused, and --strict allows none")


class _Problems:
    """What was not taken."""

    def __init__(self, context: Context, report: IngestReport) -> None:
        self._context, self._report = context, report
        self._first: Exception | None = None

    def add(self, error: Exception, path: Path, task: str | None = None) -> None:
        """Report an error. `path` is used if the error does not name a closer one."""
        self._first = self._first or error
        kind = getattr(error, "kind", "conflict" if isinstance(error, TaskConflict) else "unreadable")
        message = str(getattr(error, "message", error))
        where = source_label(Path(getattr(error, "path", None) or path))
        problem = InputProblem(where, str(kind), message, getattr(error, "hint", None), task)
        self._report.problems.append(problem)
        self._context.on_event(problem)

    def raise_first(self, message: str) -> None:
        """Raise the error if there is one; if there are several, one that has the exit code of the first."""
        problems = self._report.problems
        if self._first is None:
            return
        if len(problems) == 1:
            raise self._first
        kind = UnsafeInput if isinstance(self._first, UnsafeInput | SourceRefused) else AdapterRefused
        raise kind(message.format(count=len(problems)), kind=problems[0].kind)


# Plan


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


class _Target:
    """Where tasks go, and how: `known` is None if the store is still to be made."""

    def __init__(
        self,
        context: Context,
        known: Store | None,
        told: str | None,
        on_conflict: Conflict,
        *,
        restore: bool,
        dry_run: bool,
    ) -> None:
        self.known, self.on_conflict, self.restore = known, on_conflict, restore
        self.told = told  # the base model of image adapters, and of others that name none
        self.store = None if dry_run else known  # where blobs are stored
        self.bases = KnownBases(context, known, dry_run=dry_run)
        self.extras = ExtrasKeeper(self.bases, known, self.store)
        self.origins = None if known is None else known.tasks.origins()

    def record(self, rows: Sequence[TaskIngest]) -> list[IngestOutcome]:
        """Record tasks in one transaction, or in a dry run say what would become of them."""
        if self.store is not None:
            return self.store.tasks.ingest(rows)
        if self.known is not None:
            return self.known.tasks.plan_ingest(rows)
        from registry.tables.ingest import plan_tasks  # SQLAlchemy comes with it

        return plan_tasks(None, rows)

    def namesakes(self, tasks: Iterable[FoundTask]) -> Mapping[str, TaskOrigin]:
        """Return the tasks of the store that have the names of some that were found, by name in lower case."""
        return {} if self.origins is None else self.origins.named(task.name for task in tasks)

    def evicted(self, tasks: Iterable[FoundTask]) -> list[EvictedAdapter]:
        """Return the adapters of some tasks whose weights are not to be stored."""
        if self.restore or self.store is None:
            return []
        return [row for origin in self.namesakes(tasks).values() for row in origin.evicted]

    def others(self, tasks: Sequence[PreparedTask]) -> list[PreparedTask]:
        """Return the tasks whose final adapter is not the one that the store has under their name."""
        known = self.namesakes(task.found for task in tasks)
        same = {name: (origin.weights, origin.config) for name, origin in known.items()}
        return [item for item in tasks if same.get(item.found.name.lower()) != (item.final.weights, item.final.config)]

    def decoded(self, tasks: Iterable[PreparedTask]) -> set[str]:
        """Return which tasks have a folder that holds what their code decodes to, as `icm restore` writes it.

        That is no other adapter: taking it would put the code's losses in place of the original.
        """
        known = self.namesakes(task.found for task in tasks)
        others = [task for task in tasks if task.found.name.lower() in known]
        return {task.found.name for task in others if self._is_decoded(task.found.name, task.final)}

    def _is_decoded(self, name: str, found: NewAdapter) -> bool:
        assert self.known is not None  # only a task of the store has another adapter there
        final, (code, generator) = self.known.tasks.final(name), current_code(self.known, self.known.tasks.get(name))
        if generator is None or code is None or not final.is_evicted:
            return False
        from icmlora.fleet.resources.decoding import files_of_code  # imports torch; few tasks come here
        from icmlora.generator.versions import GeneratorFile

        try:
            made = files_of_code(self.known, GeneratorFile(self.known.blobs.read(generator.blob)), final, code)
        except FAILURES:
            return False
        return (digest_of(made.weights), digest_of(made.config)) == (found.weights, found.config)


@contextmanager
def _open_target(
    context: Context, told: str | None, on_conflict: Conflict, *, restore: bool, dry_run: bool
) -> Iterator[_Target]:
    """Open the store for writing. A dry run opens it for reading; a store that does not exist yet counts as empty."""
    make = partial(_Target, context, told=told, on_conflict=on_conflict, restore=restore, dry_run=dry_run)
    try:
        store = context.open(create=not dry_run, read_only=dry_run)
    except StoreNotFound:
        from registry.storage.folder import check_place

        if not isinstance(context.address, Path):
            raise
        check_place(context.path)
        yield make(None)
        return
    with store:
        yield make(store)


# Put and record


def _ingest_batches(
    context: Context,
    tasks: Sequence[FoundTask],
    target: _Target,
    reader: PickleReader,
    report: IngestReport,
    problems: _Problems,
) -> None:
    total = sum(len(task.adapters) for task in tasks)
    done = 0
    tensors = KnownTensors(target.origins, None if target.known is None else target.known.blobs.read)
    context.progress(done, total)
    for batch in batches(tasks):
        with converted(batch, reader) as (readable, refused):
            prepared = _prepared(readable, target, target.evicted(readable), refused)
            others = target.others(_good(prepared))
            decoded = target.decoded(others)
            tensors.look_up({task.found.name: task.final for task in others})
            try:
                outcomes = _record(prepared, target, decoded)
            except MissingBlob:
                # Weights were not stored because they were evicted, but their task now needs them: store everything.
                prepared = _prepared(readable, target, (), refused)
                outcomes = _record(prepared, target, decoded)
        for task, outcome in zip(_good(prepared), outcomes, strict=True):
            if isinstance(outcome, IngestOutcome):
                same = tensors.same_as_final(task.adapters)
                ingested = replace(_ingested(task, outcome, target.bases), same_as_final=same)
                if task.found.name in decoded:
                    ingested = replace(ingested, status="decoded")
                elif outcome.status in ("added", "replaced"):
                    ingested = replace(ingested, same_as=tensors.add(outcome.name, task.final))
                report.ingested.append(ingested)
                context.on_event(ingested)
        for problem, name in _in_order(prepared, outcomes):
            problems.add(problem.error, problem.path, name)
        done += sum(len(task.adapters) for task in batch)
        context.progress(done, total, batch[-1].name)


def _prepared(
    tasks: Sequence[FoundTask], target: _Target, evicted: Sequence[EvictedAdapter], refused: Mapping[Path, IcmLoraError]
) -> list[PreparedTask | Refusal]:
    """Store the files of some tasks, find their base models, then keep their extras, which may refer to these."""
    told, bases = target.told, target.bases
    found = prepare(tasks, target.store, evicted, refused, any_row=bases.have_loaders)
    labels = [told, *(task.base_model for task in _good(found))]
    bases.settle(label for label in labels if label is not None)
    prepared = [_with_base(item, told, bases) if isinstance(item, PreparedTask) else item for item in found]
    return target.extras.keep(prepared)


def _with_base(task: PreparedTask, told: str | None, bases: KnownBases) -> PreparedTask | Refusal:
    """Find the base model of a task; `told` is that of an image adapter, and of another one that names none."""
    label = task.base_model
    if label is None or (told is not None and task.found.final.format.is_for_images):
        changed = replace(task, base_model=told or UNKNOWN_BASE, base_is_told=told is not None, base_is_guess=False)
        return _of_architecture(changed, bases)
    if told is None or bases.name_of(told) == bases.name_of(label):
        return _of_architecture(task, bases)
    hint = f"run `icm base alias {told} {label}` if they are the same model; otherwise ingest it without --base-model"
    error = AdapterRefused(f"it was trained for {label!r}, not for {told!r}", kind="base-model", hint=hint)
    return Refusal(error, task.found.folder)


def _of_architecture(task: PreparedTask, bases: KnownBases) -> PreparedTask | Refusal:
    """Refuse an adapter of a GGUF file whose base model has another architecture than it says."""
    final = task.found.final
    if final.format.name != "gguf" or task.base_model in (None, UNKNOWN_BASE):
        return task
    from icmlora.formats.pairs.gguf import architecture_of

    try:
        bases.check_gguf(str(task.base_model), architecture_of(read_regular(final.weights, max_bytes=MAX_FILE_BYTES)))
    except AdapterRefused as error:
        return Refusal(error, final.weights)
    return task


def _record(
    prepared: Sequence[PreparedTask | Refusal], target: _Target, decoded: Collection[str]
) -> list[IngestOutcome | Refusal]:
    """Record the good tasks in one transaction, or each in its own if one of them conflicts; not those `decoded`."""
    tasks = [task for task in _good(prepared) if task.found.name not in decoded]
    rows = [_rows(task, target) for task in tasks]
    outcomes: Iterator[IngestOutcome | Refusal]
    try:
        outcomes = iter(target.record(rows))
    except TaskConflict:
        outcomes = iter([_record_one(target, row, task) for row, task in zip(rows, tasks, strict=True)])
    return [
        IngestOutcome(task.found.name, 0, len(task.adapters), "known", task.base_model or UNKNOWN_BASE)
        if task.found.name in decoded
        else next(outcomes)
        for task in _good(prepared)
    ]


def _record_one(target: _Target, row: TaskIngest, task: PreparedTask) -> IngestOutcome | Refusal:
    try:
        return target.record([row])[0]
    except TaskConflict as error:
        return Refusal(error, task.found.folder)


def _rows(task: PreparedTask, target: _Target) -> TaskIngest:
    return TaskIngest(
        name=task.found.name,
        base_model=task.base_model or UNKNOWN_BASE,
        base_is_told=task.base_is_told,
        adapters=task.adapters,
        samples=task.samples,
        eval_data=task.eval_data,
        on_conflict=target.on_conflict,
        restore=target.restore,
    )


def _good(prepared: Sequence[PreparedTask | Refusal]) -> list[PreparedTask]:
    return [item for item in prepared if isinstance(item, PreparedTask)]


def _in_order(
    prepared: Sequence[PreparedTask | Refusal], outcomes: Sequence[IngestOutcome | Refusal]
) -> list[tuple[Refusal, str | None]]:
    """Return all problems by path, each with the task that was taken without it."""
    problems: list[tuple[Refusal, str | None]] = [(item, None) for item in prepared if isinstance(item, Refusal)]
    for task, outcome in zip(_good(prepared), outcomes, strict=True):
        if isinstance(outcome, Refusal):
            problems.append((outcome, None))
        name = None if isinstance(outcome, Refusal) else outcome.name
        problems += [(problem, name) for problem in task.problems]
    return sorted(problems, key=lambda item: str(item[0].path))


def _ingested(task: PreparedTask, outcome: IngestOutcome, bases: KnownBases) -> TaskIngested:
    final, base = task.final, bases.name_of(outcome.base_model)
    return TaskIngested(
        task=outcome.name,
        status=outcome.status,
        new=outcome.new,
        known=outcome.known,
        size=task.size,
        evicted=outcome.evicted,
        restored=outcome.restored,
        samples=task.samples_read,
        eval_data=task.eval_read,
        folder=source_label(task.found.folder),
        is_renamed=not task.found.is_called_like_its_folder(outcome.name),
        base_model=base,
        base_is_guess=task.base_is_guess and outcome.status in ("added", "replaced"),
        original_only=final.original_only or (WITHOUT_BASE if base == UNKNOWN_BASE else None),
        extras_size=sum(extra.packed_size for extra in final.extras),
        lora_size=_lora_size(final),
        converted_from=task.found.final.pickle,
        initial=None if task.found.final.initial is None else source_label(task.found.final.initial.parent),
        format=final.format,
        wrapper=task.wrapper,
    )


def _lora_size(row: NewAdapter) -> int:
    if row.original_only is not None:
        return 0
    return row.parameters * max((ITEM_BYTES.get(dtype, 4) for dtype in row.dtype.split("+")), default=4)
