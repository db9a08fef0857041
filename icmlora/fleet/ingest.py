"""What an ingest is asked for and what it reports.

Take adapters into the store: find them, check them, store their bytes, then record them.

    paths --find--> tasks --batch--> blobs --commit--> rows
                      `--> refusals: the first one ends the ingest, or all are passed over (skip_bad)

What a batch has recorded stays. The same ingest again records only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icmlora.errors import AdapterRefused
from icmlora.fleet.context import Context, Event, Progress, StopFlag
from icmlora.fleet.ingest_files import PreparedTask, Problem, batches, prepare
from icmlora.formats.discovery import Discovery, FoundTask, find_adapters
from registry.errors import MissingBlob, StoreNotFound, TaskConflict
from registry.records import IngestOutcome, TaskIngest

if TYPE_CHECKING:
    from registry.records import EvictedAdapter
    from registry.store import Store

Conflict = Literal["skip", "replace", "fail"]


@dataclass(frozen=True)
class IngestRequest:
    """What to take into the store.

    Attributes:
        paths: Folders that hold adapters at any depth.
        name: A name for the one task that is found, instead of its folder's.
        samples: Training texts for the one task that is found, instead of `samples.jsonl` beside it.
        skip_bad: Go on past what is refused.
        on_conflict: What to do with a task whose name has another adapter in the store.
        dry_run: Check everything, say what the store would make of it, and store nothing.
        restore: Bring evicted originals back; else they are known and stay evicted.
        texts: Take `samples.jsonl` and `eval.jsonl` that lie beside adapters; `samples` is taken in any case.
    """

    paths: tuple[Path, ...]
    name: str | None = None
    samples: Path | None = None
    skip_bad: bool = False
    on_conflict: Conflict = "fail"
    dry_run: bool = False
    restore: bool = False
    texts: bool = True


@dataclass(frozen=True)
class Ingested(Event):
    """A task is in the store now, or would be.

    Attributes:
        task: Its name.
        status: `added`, `updated`, `known`, `replaced` or `skipped`.
        new: Adapters that were recorded.
        known: Adapters that the store had.
        size: Bytes of all its adapters' files.
        evicted: Known adapters that stay evicted.
        restored: Known adapters that were evicted and are back.
    """

    task: str
    status: str
    new: int
    known: int
    size: int
    evicted: int = 0
    restored: int = 0


@dataclass(frozen=True)
class Refused(Event):
    """Something that is not taken.

    Attributes:
        path: The file or folder.
        kind: A short stable word for the reason.
        message: The fact.
        hint: What to do next, or None.
    """

    path: str
    kind: str
    message: str
    hint: str | None


@dataclass
class IngestReport:
    """What an ingest did.

    Attributes:
        found: Tasks that were found.
        ingested: One entry per task that was taken or already there.
        refused: One entry per refusal that was passed over.
        without_vectors: Tasks of this ingest that have no task vectors yet; a dry run does not say.
        stopped: Whether the user stopped it before the end.
    """

    found: int = 0
    ingested: list[Ingested] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    without_vectors: list[str] = field(default_factory=list)
    stopped: bool = False

    @property
    def new(self) -> int:
        """Adapters that were recorded."""
        return sum(task.new for task in self.ingested)

    @property
    def known(self) -> int:
        """Adapters that the store had."""
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
        """Bytes of all adapters that were taken or already there."""
        return sum(task.size for task in self.ingested)


_Record = Callable[[Sequence[TaskIngest]], list[IngestOutcome]]


@dataclass(frozen=True)
class _Target:
    """Where tasks go.

    Attributes:
        store: Where the bytes of files go; None in a dry run.
        record: Records tasks, or says what that would do.
        evicted: Adapters whose weights are checked and not stored.
    """

    store: Store | None
    record: _Record
    evicted: Sequence[EvictedAdapter] = ()


def ingest(context: Context, request: IngestRequest, stop: StopFlag) -> Generator[Event, None, IngestReport]:
    """Take adapters into the store, which is made if there is none.

    Yields:
        `Step` for progress, `Ingested` for each task, `Refused` for each refusal that is passed over.

    Raises:
        AdapterRefused: Something was refused and `skip_bad` is off, or nothing at all was found or taken.
        TaskConflict: A task's name has another adapter in the store, likewise.
        RegistryError: The store cannot be used.
    """
    discovery = _find(request)
    report = IngestReport(found=len(discovery.tasks))
    for refusal in discovery.refused:
        yield _pass_over(refusal, Path(refusal.path or "."), request, report)
    with _target(context, request) as target:
        yield from _ingest_batches(discovery.tasks, request, target, report, stop)
        if target.store is not None:
            report.without_vectors = _without_vectors(target.store, report)
    if not report.ingested and report.refused and not report.stopped:
        first = report.refused[0]
        fact = f"nothing was taken: all {len(report.refused)} found were refused"
        raise AdapterRefused(fact, kind=first.kind, path=first.path, hint=first.hint)
    return report


@contextmanager
def _target(context: Context, request: IngestRequest) -> Iterator[_Target]:
    """Open the store to write, or for a dry run to read, where a store that is not there yet is an empty one."""
    if not request.dry_run:
        with context.open(create=True) as store:
            yield _Target(store, store.tasks.ingest, () if request.restore else store.originals.evicted())
        return
    present = _open_to_read(context)
    if present is None:
        # SQLAlchemy comes with it, and takes most of the time that a short command has.
        from registry.folder import check_place
        from registry.ingest import plan_tasks

        check_place(context.path)
        yield _Target(None, partial(plan_tasks, None))
        return
    with present:
        yield _Target(None, present.tasks.plan_ingest)


def _open_to_read(context: Context) -> Store | None:
    try:
        return context.open(read_only=True)
    except StoreNotFound:
        return None


def _find(request: IngestRequest) -> Discovery:
    discovery = find_adapters(request.paths, name=request.name, texts=request.texts)
    if not discovery.tasks and not discovery.refused:
        paths = ", ".join(str(path) for path in request.paths)
        hint = "an adapter is a folder with adapter_config.json and adapter_model.safetensors"
        raise AdapterRefused("no adapter was found", kind="nothing-found", path=paths, hint=hint)
    if request.samples is None:
        return discovery
    if len(discovery.tasks) != 1:
        fact = f"--samples is for one task, but {len(discovery.tasks)} were found"
        raise AdapterRefused(fact, kind="samples", path=request.samples, hint="give the folder of one task")
    return replace(discovery, tasks=(replace(discovery.tasks[0], samples=request.samples),))


def _ingest_batches(
    tasks: Sequence[FoundTask], request: IngestRequest, target: _Target, report: IngestReport, stop: StopFlag
) -> Generator[Event, None, None]:
    total = sum(len(task.adapters) for task in tasks)
    done = 0
    yield Progress(done, total)
    for batch in batches(tasks):
        if stop.requested:
            report.stopped = True
            return
        prepared = prepare(batch, target.store, target.evicted)
        # Recorded before any refusal is raised: what is good of a batch stays, wherever the bad one stands in it.
        try:
            outcomes = _record(prepared, request, target.record)
        except MissingBlob:
            # Weights were left out since they are evicted, and now their task gets another adapter: all are needed.
            prepared = prepare(batch, target.store)
            outcomes = _record(prepared, request, target.record)
        for item, outcome in zip(_good(prepared), outcomes, strict=True):
            if isinstance(outcome, IngestOutcome):
                ingested = _ingested(item, outcome)
                report.ingested.append(ingested)
                yield ingested
        for problem in _problems(prepared, outcomes):
            yield _pass_over(problem.error, problem.path, request, report)
        done += sum(len(task.adapters) for task in batch)
        yield Progress(done, total, batch[-1].name)


def _good(prepared: Sequence[PreparedTask | Problem]) -> list[PreparedTask]:
    return [item for item in prepared if isinstance(item, PreparedTask)]


def _ingested(task: PreparedTask, outcome: IngestOutcome) -> Ingested:
    return Ingested(
        task=outcome.name,
        status=outcome.status,
        new=outcome.new,
        known=outcome.known,
        size=task.size,
        evicted=outcome.evicted,
        restored=outcome.restored,
    )


def _problems(prepared: Sequence[PreparedTask | Problem], outcomes: Sequence[IngestOutcome | Problem]) -> list[Problem]:
    problems = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
    for item in prepared:
        problems.extend([item] if isinstance(item, Problem) else item.problems)
    return sorted(problems, key=lambda problem: str(problem.path))


def _record(
    prepared: Sequence[PreparedTask | Problem], request: IngestRequest, record: _Record
) -> list[IngestOutcome | Problem]:
    """Record what is good in one transaction; if one task conflicts, each in its own."""
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


def _pass_over(error: Exception, path: Path, request: IngestRequest, report: IngestReport) -> Refused:
    """Note a refusal, or raise it if refusals end the ingest."""
    if not request.skip_bad:
        raise error
    kind = getattr(error, "kind", "conflict" if isinstance(error, TaskConflict) else "unreadable")
    message = str(getattr(error, "message", error))
    where = str(getattr(error, "path", None) or path)
    refused = Refused(where, str(kind), message, getattr(error, "hint", None))
    report.refused.append(refused)
    return refused


def _without_vectors(store: Store, report: IngestReport) -> list[str]:
    names = {task.task for task in report.ingested}
    return [name for name in store.tasks.without_vectors() if name in names]
