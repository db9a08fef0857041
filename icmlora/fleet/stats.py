"""The bill: what the fleet takes on disk, what it would take as generator and codes, and what the codes keep.

Sizes come from the files. A blob that several rows share counts once in the totals, and fully in each task's line.

Pictures of the store; they need matplotlib, the extra `plot`.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from icmlora.errors import DataError
from icmlora.fleet.context import Context
from icmlora.io.staging import check_absent, writing_file
from icmlora.io.text import counted
from registry.evaluations import latest
from registry.records import Asked, EvaluationRecord, GeneratorRecord, TaskSummary
from registry.usage import Usage

if TYPE_CHECKING:
    from registry.store import Store

_BF16 = 2  # bytes per parameter: what a user would otherwise keep


@dataclass(frozen=True)
class TaskBill:
    """One task; None where it has no code under the current generator, or was not measured.

    Error and gain are those of the best rung that it has besides its original: residual or code. `original_size` is
    what is on disk of the final adapter; of an evicted one its configuration and card.
    """

    task: str
    bf16_size: int
    original_size: int
    vectors_size: int
    code_size: int | None
    residual_size: int | None
    rung: Literal["residual", "code"] | None
    dw_error: float | None
    retained_gain: float | None
    evicted: bool
    asked: Asked | None

    @property
    def size(self) -> int:
        """What it takes besides its original: code, residual and vectors."""
        return (self.code_size or 0) + (self.residual_size or 0) + self.vectors_size

    @property
    def fell_short(self) -> bool:
        """Whether nothing keeps what was asked for, so that it has to keep the original that it has."""
        return self.asked is not None and not self.asked.is_kept and not self.evicted


@dataclass(frozen=True)
class FleetBill:
    """The tasks of one base model."""

    base_model: str
    generator: GeneratorRecord | None
    tasks: tuple[TaskBill, ...]

    @property
    def bf16_size(self) -> int:
        """Every final adapter in bfloat16: the denominator of every saving."""
        return sum(task.bf16_size for task in self.tasks)

    @property
    def generator_size(self) -> int:
        """The current generator's file."""
        return 0 if self.generator is None else self.generator.size

    @property
    def start_size(self) -> int:
        """What the generator knows of unseen tasks, 0 where it was not learned."""
        return 0 if self.generator is None else self.generator.start_size

    @property
    def shared_size(self) -> int:
        """What all tasks share: generator and start."""
        return self.generator_size + self.start_size

    @property
    def per_task_size(self) -> int:
        """All codes, residuals and vectors."""
        return sum(task.size for task in self.tasks)

    @property
    def encoded(self) -> tuple[TaskBill, ...]:
        """The tasks that have a code."""
        return tuple(task for task in self.tasks if task.code_size is not None)

    @property
    def evicted(self) -> int:
        """How many tasks have no original any more."""
        return sum(task.evicted for task in self.tasks)

    @property
    def short(self) -> tuple[TaskBill, ...]:
        """The tasks that keep their original because nothing smaller keeps what was asked for."""
        return tuple(task for task in self.tasks if task.fell_short)

    @property
    def marginal_size(self) -> float | None:
        """Mean bytes of one more task: its code, residual and vectors."""
        if not self.encoded:
            return None
        return sum(task.size for task in self.encoded) / len(self.encoded)

    @property
    def break_even(self) -> int | None:
        """Number of tasks from which generator and codes are smaller than bf16; None if they never are."""
        if self.marginal_size is None:
            return None
        saved = sum(task.bf16_size for task in self.encoded) / len(self.encoded) - self.marginal_size
        return math.ceil(self.shared_size / saved) if saved > 0 else None


@dataclass(frozen=True)
class Bill:
    """The whole store."""

    usage: Usage
    fleets: tuple[FleetBill, ...]

    @property
    def bf16_size(self) -> int:
        """Every final adapter of the store in bfloat16."""
        return sum(fleet.bf16_size for fleet in self.fleets)

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return sum(len(fleet.tasks) for fleet in self.fleets)

    @property
    def evicted(self) -> int:
        """How many tasks have no original any more."""
        return sum(fleet.evicted for fleet in self.fleets)

    @property
    def compact_size(self) -> int:
        """What all encoded tasks need without their originals: generators, codes, residuals, vectors, database."""
        usage = self.usage
        return usage.generators + usage.codes + usage.residuals + usage.vectors + usage.database

    @property
    def is_complete(self) -> bool:
        """Whether there are tasks and every one has a code, so that the compact size stands for all of them."""
        return bool(self.fleets) and all(len(fleet.encoded) == len(fleet.tasks) for fleet in self.fleets)

    @property
    def compact_share(self) -> float | None:
        """The compact size in terms of bf16, above 1 where it costs more; None until every task has a code."""
        return self.compact_size / self.bf16_size if self.is_complete and self.bf16_size else None


def bill(context: Context) -> Bill:
    """Add everything up. Reads rows and file sizes, no file's content."""
    with context.open(read_only=True) as store:
        rows = list(store.tasks.summaries())
        labels = sorted({row.task.base_model for row in rows})
        known = _Known(store)
        fleets = []
        for label in labels:
            generator = store.generators.current(label)
            tasks = tuple(known.task(row, generator) for row in rows if row.task.base_model == label)
            fleets.append(FleetBill(label, generator, tasks))
        return Bill(store.usage(), tuple(fleets))


class _Known:
    """What the rows of all tasks say, read at once: a query for each of a thousand tasks takes seconds."""

    def __init__(self, store: Store) -> None:
        self._vectors: defaultdict[str, set[str]] = defaultdict(set)
        self._evaluations: defaultdict[str, list[EvaluationRecord]] = defaultdict(list)
        for vector in store.vectors.all():
            self._vectors[vector.task].add(vector.blob)
        for evaluation in store.evaluations.all():
            self._evaluations[evaluation.task].append(evaluation)
        self._size = store.blobs.size

    def task(self, row: TaskSummary, generator: GeneratorRecord | None) -> TaskBill:
        code, measured = row.code, None
        if code is not None and generator is not None:
            measured = latest(self._evaluations[row.task.name], row.task, code.rung, generator)
        return TaskBill(
            task=row.task.name,
            bf16_size=_BF16 * row.final.parameters,
            original_size=row.final.stored_bytes,
            vectors_size=sum(map(self._size, self._vectors[row.task.name])),
            code_size=None if code is None else code.size,
            residual_size=None if code is None or code.residual is None else code.residual.size,
            rung=None if code is None else code.rung,
            dw_error=None if code is None else code.best_error,
            retained_gain=None if measured is None else measured.retained_gain,
            evicted=row.final.is_evicted,
            asked=None if code is None else code.asked,
        )


_MEBIBYTE = 2**20
# Without the date: the same store gives the same bytes.
_METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": None}


def check_plot(path: Path, *, force: bool = False) -> None:
    """Check that a plot can be drawn to a file, before the work of finding out what is on it.

    Raises:
        DataError: The file's ending is not svg, png or pdf, or matplotlib is not installed.
        OutputExists: The file exists and `force` is not given.
    """
    if path.suffix.lower() not in _METADATA:
        raise DataError("a plot is an .svg, .png or .pdf file", path=path, hint="give it one of these endings")
    check_absent(path, force=force)
    _pyplot()


def plot_bill(found: Bill, path: Path, *, force: bool = False) -> None:
    """Draw bytes against the number of tasks: every adapter in bf16, and generator plus codes and vectors.

    The file is written whole, or not at all.

    Raises:
        DataError: Nothing is encoded.
        OutputExists: The file exists and `force` is not given.
    """
    fleets = [fleet for fleet in found.fleets if fleet.encoded]
    if not fleets:
        raise DataError("nothing is encoded, so there is nothing to draw", hint="`icm train` makes codes")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        1, len(fleets), squeeze=False, figsize=(6.4 * len(fleets), 4.2), layout="constrained"
    )
    for axis, fleet in zip(axes[0], fleets, strict=True):
        _draw(axis, fleet)
    picture, ending = io.BytesIO(), path.suffix.lower()
    figure.savefig(picture, format=ending[1:], metadata=_METADATA[ending])
    pyplot.close(figure)
    with writing_file(path, force=force) as stream:
        stream.write(picture.getvalue())


def _draw(axis: Any, fleet: FleetBill) -> None:
    bf16 = sum(task.bf16_size for task in fleet.encoded) / len(fleet.encoded)
    marginal = fleet.marginal_size or 0.0
    tasks = len(fleet.encoded)
    last = max(tasks, 2 * (fleet.break_even or tasks))
    counts = list(range(last + 1))
    axis.plot(counts, [bf16 * count / _MEBIBYTE for count in counts], label="every adapter in bf16")
    compact = [(fleet.shared_size + marginal * count) / _MEBIBYTE for count in counts]
    axis.plot(counts, compact, label="generator + codes + vectors")
    axis.plot([tasks], [compact[tasks]], "o", color="C1", label=f"this fleet: {counted(tasks, 'task')}")
    if fleet.break_even is not None:
        axis.axvline(fleet.break_even, color="grey", linestyle=":", label=f"break-even at {fleet.break_even}")
    axis.set_title(fleet.base_model.replace("$", r"\$"), fontsize="medium")
    axis.set_xlabel("tasks")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("MiB on disk")
    axis.set_ylim(bottom=0)
    axis.legend()


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[plot]'"
        raise DataError("drawing needs matplotlib, which is not installed", hint=hint) from error
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "icm"
    from matplotlib import pyplot

    return pyplot
