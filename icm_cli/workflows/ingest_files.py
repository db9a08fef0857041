"""Read, check and store the files of found tasks, a batch at a time.

    FoundTask --check--> PreparedTask (everything stored as blobs, ready to be recorded as rows)
         `--------------> Problem     (refused: why, and which task or checkpoint it costs)

Weights are checked in the very bytes that are hashed and stored. Configurations, cards and texts are small: they are
read once, checked, and stored from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.discovery import FoundAdapter, FoundTask
from icmlora.errors import IcmLoraError
from icmlora.examples import MAX_BYTES, parse_examples
from icmlora.files import read_regular
from icmlora.inspection import AdapterSummary, inspect_adapter
from registry.intake import PutRefusal
from registry.records import NewAdapter

if TYPE_CHECKING:
    from registry.store import Store

_CONFIG_LIMIT = 1 << 20
_CARD_LIMIT = 4 << 20
_BATCH_BYTES = 256 << 20
_BATCH_ADAPTERS = 256  # a kill costs at most reading so many again: their blobs are in the store by then


@dataclass(frozen=True)
class Problem:
    """A refusal: of one checkpoint, or of the whole task."""

    error: Exception
    path: Path


@dataclass(frozen=True)
class PreparedTask:
    """A task whose bytes are in the store, or, in a dry run, were found good.

    Attributes:
        adapters: What is to be recorded; without digests in a dry run.
        problems: Checkpoints that were left out.
    """

    found: FoundTask
    base_model: str
    adapters: tuple[NewAdapter, ...]
    samples: str | None
    eval_data: str | None
    size: int
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Files:
    """The small files of one adapter, read and waiting for its weights."""

    found: FoundAdapter
    config: bytes
    card: bytes | None


@dataclass(frozen=True)
class _Checked:
    """One adapter whose files are all good."""

    files: _Files
    summary: AdapterSummary
    weights: str
    size: int


@dataclass(frozen=True)
class _Gathered:
    """One task whose files are all read and good, its weights stored, its small files not yet."""

    task: FoundTask
    adapters: tuple[_Checked, ...]
    samples: bytes | None
    eval_data: bytes | None
    problems: tuple[Problem, ...]

    def small_files(self) -> list[bytes]:
        """Return what is still to be stored."""
        files = [data for item in self.adapters for data in (item.files.config, item.files.card)]
        return [data for data in [*files, self.samples, self.eval_data] if data is not None]


def batches(tasks: Sequence[FoundTask]) -> Iterator[list[FoundTask]]:
    """Split tasks into batches of bounded size; a task is never split."""
    batch: list[FoundTask] = []
    size = count = 0
    for task in tasks:
        texts = (path for path in (task.samples, task.eval_data) if path is not None)
        weight = sum(map(_size, [*(adapter.weights for adapter in task.adapters), *texts]))
        if batch and (size + weight > _BATCH_BYTES or count + len(task.adapters) > _BATCH_ADAPTERS):
            yield batch
            batch, size, count = [], 0, 0
        batch.append(task)
        size, count = size + weight, count + len(task.adapters)
    if batch:
        yield batch


def prepare(tasks: Sequence[FoundTask], store: Store | None) -> list[PreparedTask | Problem]:
    """Check the files of some tasks and store them as blobs.

    Args:
        tasks: One batch.
        store: Where the blobs go; None only checks.

    Returns:
        For each task, in order: what is to be recorded, or why it is refused.
    """
    small = [[_read_small(adapter) for adapter in task.adapters] for task in tasks]
    waiting = {item.found.weights: item for items in small for item in items if isinstance(item, _Files)}
    checked = _check_only(waiting) if store is None else _check_and_store(waiting, store)
    gathered: list[_Gathered | Problem] = []
    for task, items in zip(tasks, small, strict=True):
        outcomes = [item if isinstance(item, Problem) else checked[item.found.weights] for item in items]
        try:
            gathered.append(_gather(task, outcomes))
        except IcmLoraError as error:
            gathered.append(Problem(error, task.folder))
    # All small files of the batch at once: what takes time is waiting for the disk, once per call.
    contents = [data for item in gathered if isinstance(item, _Gathered) for data in item.small_files()]
    digests = (
        dict.fromkeys(contents, "") if store is None else dict(zip(contents, store.put_blobs(contents), strict=True))
    )
    return [item if isinstance(item, Problem) else _prepared(item, digests) for item in gathered]


def _read_small(found: FoundAdapter) -> _Files | Problem:
    try:
        config = read_regular(found.config, max_bytes=_CONFIG_LIMIT)
        card = None if found.card is None else read_regular(found.card, max_bytes=_CARD_LIMIT)
    except IcmLoraError as error:
        return Problem(error, found.folder)
    return _Files(found, config, card)


def _check_and_store(waiting: dict[Path, _Files], store: Store) -> dict[Path, _Checked | Problem]:
    def inspect(path: Path, data: bytes) -> AdapterSummary:
        return inspect_adapter(waiting[path].config, data, path=path)

    checked: dict[Path, _Checked | Problem] = {}
    for result in store.put_files(list(waiting), inspect, refusals=(IcmLoraError,)):
        files = waiting[result.path]
        if isinstance(result, PutRefusal):
            checked[result.path] = Problem(result.error, files.found.folder)
        else:
            checked[result.path] = _Checked(files, result.inspected, result.digest, result.size)
    return checked


def _check_only(waiting: dict[Path, _Files]) -> dict[Path, _Checked | Problem]:
    checked: dict[Path, _Checked | Problem] = {}
    for path, files in waiting.items():
        try:
            data = read_regular(path, max_bytes=_size(path))
            checked[path] = _Checked(files, inspect_adapter(files.config, data, path=path), "", len(data))
        except IcmLoraError as error:
            checked[path] = Problem(error, files.found.folder)
    return checked


def _gather(task: FoundTask, outcomes: Sequence[_Checked | Problem]) -> _Gathered | Problem:
    """Bring together what was read of one task; without its final adapter there is no task.

    Raises:
        IcmLoraError: Its samples or held-out texts cannot be used.
    """
    good = tuple(outcome for outcome in outcomes if isinstance(outcome, _Checked))
    problems = tuple(outcome for outcome in outcomes if isinstance(outcome, Problem))
    if not any(outcome.files.found.is_final for outcome in good):
        return next(problem for problem in problems if problem.path == task.final.folder)
    return _Gathered(task, good, _read_texts(task.samples), _read_texts(task.eval_data), problems)


def _read_texts(path: Path | None) -> bytes | None:
    if path is None:
        return None
    data = read_regular(path, max_bytes=MAX_BYTES)
    parse_examples(data, path=path)
    return data


def _prepared(gathered: _Gathered, digests: dict[bytes, str]) -> PreparedTask:
    files = [outcome.files for outcome in gathered.adapters]
    return PreparedTask(
        found=gathered.task,
        base_model=next(item.summary.base_model for item in gathered.adapters if item.files.found.is_final),
        adapters=tuple(_row(outcome, digests) for outcome in gathered.adapters),
        samples=None if gathered.samples is None else digests[gathered.samples],
        eval_data=None if gathered.eval_data is None else digests[gathered.eval_data],
        size=sum(item.size for item in gathered.adapters) + sum(len(f.config) + len(f.card or b"") for f in files),
        problems=gathered.problems,
    )


def _row(checked: _Checked, digests: dict[bytes, str]) -> NewAdapter:
    found, summary = checked.files.found, checked.summary
    return NewAdapter(
        weights=checked.weights,
        config=digests[checked.files.config],
        card=None if checked.files.card is None else digests[checked.files.card],
        step=found.step,
        is_final=found.is_final,
        dtype=summary.dtype,
        rank_max=summary.rank_max,
        parameters=summary.parameters,
        target_modules=summary.target_modules,
        layout=[(shape.module, shape.rank, shape.inputs, shape.outputs) for shape in summary.layout],
        source=str(found.folder),
    )


def _size(path: Path) -> int:
    """Return a file's size for planning; one that vanished is refused when it is read."""
    try:
        return path.stat(follow_symlinks=False).st_size
    except OSError:
        return 0
