"""Ingest adapters: find them, check them, store their bytes, then record them.

    plan     paths -> tasks, in batches
    put      files -> checked in memory -> blobs, durable        (icmlora.fleet.ingest_files)
    record   one transaction per batch -> rows

A refused input ends the ingest, or is reported and skipped (`skip_bad`). A text without a usable row is always reported
and skipped: its task is taken without it. Recorded batches stay; running the same ingest again records only what is
missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.errors import AdapterRefused, BaseModelNotFound, Cancelled
from icmlora.fleet.context import Context, Event, locate_base, reporting
from icmlora.fleet.ingest_files import PreparedTask, Problem, TextRead, batches, prepare
from icmlora.formats.discovery import Discovery, FoundTask, find_adapters
from registry.errors import MissingBlob, StoreNotFound, TaskConflict
from registry.records import IngestOutcome, TaskIngest

if TYPE_CHECKING:
    from registry.records import EvictedAdapter
    from registry.store import Store

Conflict = Literal["skip", "replace", "fail"]


@dataclass(frozen=True)
class IngestRequest:
    """What to ingest."""

    paths: tuple[Path, ...]
    name: str | None = None
    samples: Path | None = None
    texts: bool = True
    skip_bad: bool = False
    on_conflict: Conflict = "fail"
    restore: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class TaskIngested(Event):
    """A task is in the store now, or would be after a dry run."""

    task: str
    status: str  # `added`, `updated`, `known`, `replaced` or `skipped`
    new: int
    known: int
    size: int  # bytes of all its adapters' files
    evicted: int = 0
    restored: int = 0
    samples: TextRead | None = None
    eval_data: TextRead | None = None


@dataclass(frozen=True)
class InputRefused(Event):
    """An input that was refused and skipped; with `in_part` a text, whose task was taken without it."""

    path: str
    kind: str
    message: str
    hint: str | None
    in_part: bool = False


@dataclass
class IngestReport:
    """What an ingest did."""

    found: int = 0
    ingested: list[TaskIngested] = field(default_factory=list)
    refused: list[InputRefused] = field(default_factory=list)
    without_vectors: list[str] = field(default_factory=list)
    # Those of `without_vectors` whose base model is on this machine.
    extractable: list[str] = field(default_factory=list)

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


def ingest(context: Context, request: IngestRequest) -> IngestReport:
    """Ingest adapters into the store, creating it if necessary."""
    found = _find(request)
    report = IngestReport(found=len(found.tasks))
    refusals = _Refusals(context, request.skip_bad, report)
    with reporting(report):
        for refusal in found.refused:
            refusals.add(refusal, Path(refusal.path or "."))
        with _open_target(context, request) as target:
            try:
                _ingest_batches(context, found.tasks, request, target, report, refusals)
            except Cancelled:
                _note_missing_vectors(target.store, report)
                raise
            _note_missing_vectors(target.store, report)
    if not report.ingested and report.refused:
        first = report.refused[0]
        fact = f"nothing was ingested: all {len(report.refused)} inputs were refused"
        raise AdapterRefused(fact, kind=first.kind, path=first.path, hint=first.hint)
    return report


class _Refusals:
    """The one place that decides what a refused input does: end the ingest, or go into the report."""

    def __init__(self, context: Context, skip_bad: bool, report: IngestReport) -> None:
        self._context, self._skip_bad, self._report = context, skip_bad, report

    def add(self, error: Exception, path: Path, *, in_part: bool = False) -> None:
        """Raise the error, or report it and go on. `path` is used if the error does not name a closer one."""
        if not self._skip_bad and not in_part:
            raise error
        kind = getattr(error, "kind", "conflict" if isinstance(error, TaskConflict) else "unreadable")
        message = str(getattr(error, "message", error))
        where = str(getattr(error, "path", None) or path)
        refused = InputRefused(where, str(kind), message, getattr(error, "hint", None), in_part)
        self._report.refused.append(refused)
        self._context.on_event(refused)


# Plan


def _find(request: IngestRequest) -> Discovery:
    found = find_adapters(request.paths, name=request.name, texts=request.texts)
    if not found.tasks and not found.refused:
        paths = ", ".join(str(path) for path in request.paths)
        hint = "an adapter is a folder with adapter_config.json and adapter_model.safetensors"
        raise AdapterRefused("no adapter was found", kind="nothing-found", path=paths or None, hint=hint)
    if request.samples is None:
        return found
    if len(found.tasks) != 1:
        fact = f"--samples is for one task, but {len(found.tasks)} were found"
        raise AdapterRefused(fact, kind="samples", path=request.samples, hint="give the folder of a single task")
    return replace(found, tasks=(replace(found.tasks[0], samples=request.samples),))


_Record = Callable[[Sequence[TaskIngest]], list[IngestOutcome]]


@dataclass(frozen=True)
class _Target:
    """Where tasks go."""

    store: Store | None  # where blobs are stored; None in a dry run
    record: _Record
    evicted: Sequence[EvictedAdapter] = ()


@contextmanager
def _open_target(context: Context, request: IngestRequest) -> Iterator[_Target]:
    """Open the store for writing. A dry run opens it for reading; a store that does not exist yet counts as empty."""
    if not request.dry_run:
        with context.open(create=True) as store:
            yield _Target(store, store.tasks.ingest, () if request.restore else store.originals.evicted())
        return
    try:
        present = context.open(read_only=True)
    except StoreNotFound:
        # SQLAlchemy comes with these, so they are imported only if they are needed.
        from registry.folder import check_place
        from registry.ingest import plan_tasks

        check_place(context.path)
        yield _Target(None, partial(plan_tasks, None))
        return
    with present:
        yield _Target(None, present.tasks.plan_ingest)


# Put and record


def _ingest_batches(
    context: Context,
    tasks: Sequence[FoundTask],
    request: IngestRequest,
    target: _Target,
    report: IngestReport,
    refusals: _Refusals,
) -> None:
    total = sum(len(task.adapters) for task in tasks)
    done = 0
    context.progress(done, total)
    for batch in batches(tasks):
        prepared = prepare(batch, target.store, target.evicted)
        # Good tasks are recorded before a refusal is raised, wherever in the batch the refused one is.
        try:
            outcomes = _record(prepared, request, target.record)
        except MissingBlob:
            # Weights were not stored because they were evicted, but their task now needs them: store everything.
            prepared = prepare(batch, target.store)
            outcomes = _record(prepared, request, target.record)
        for task, outcome in zip(_good(prepared), outcomes, strict=True):
            if isinstance(outcome, IngestOutcome):
                ingested = _ingested(task, outcome)
                report.ingested.append(ingested)
                context.on_event(ingested)
        # Those that may end the ingest come last.
        for problem in sorted(_problems(prepared, outcomes), key=lambda problem: not problem.in_part):
            refusals.add(problem.error, problem.path, in_part=problem.in_part)
        done += sum(len(task.adapters) for task in batch)
        context.progress(done, total, batch[-1].name)


def _record(
    prepared: Sequence[PreparedTask | Problem], request: IngestRequest, record: _Record
) -> list[IngestOutcome | Problem]:
    """Record the good tasks in one transaction, or each in its own if one of them conflicts."""
    tasks = _good(prepared)
    rows = [_rows(task, request) for task in tasks]
    try:
        return list(record(rows))
    except TaskConflict:
        return [_record_one(record, row, task) for row, task in zip(rows, tasks, strict=True)]


def _record_one(record: _Record, row: TaskIngest, task: PreparedTask) -> IngestOutcome | Problem:
    try:
        return record([row])[0]
    except TaskConflict as error:
        return Problem(error, task.found.folder)


def _rows(task: PreparedTask, request: IngestRequest) -> TaskIngest:
    return TaskIngest(
        name=task.found.name,
        base_model=task.base_model,
        adapters=task.adapters,
        samples=task.samples,
        eval_data=task.eval_data,
        on_conflict=request.on_conflict,
        restore=request.restore,
    )


def _good(prepared: Sequence[PreparedTask | Problem]) -> list[PreparedTask]:
    return [item for item in prepared if isinstance(item, PreparedTask)]


def _problems(prepared: Sequence[PreparedTask | Problem], outcomes: Sequence[IngestOutcome | Problem]) -> list[Problem]:
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    for item in prepared:
        problems.extend([item] if isinstance(item, Problem) else item.problems)
    return sorted(problems, key=lambda problem: str(problem.path))


def _ingested(task: PreparedTask, outcome: IngestOutcome) -> TaskIngested:
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
    )


def _note_missing_vectors(store: Store | None, report: IngestReport) -> None:
    """Note which of the ingested tasks lack vectors, and for which of them the base model is on this machine."""
    if store is None:
        return
    names = {task.task for task in report.ingested}
    report.without_vectors = [name for name in store.tasks.without_vectors() if name in names]
    base_models = {name: store.tasks.get(name).base_model for name in report.without_vectors}
    local = {label for label in set(base_models.values()) if _is_local(store, label)}
    report.extractable = [name for name in report.without_vectors if base_models[name] in local]


def _is_local(store: Store, label: str) -> bool:
    try:
        locate_base(store, label)
    except BaseModelNotFound:
        return False
    return True
