"""Compare a fleet's sources with other methods, such as int8 or a low-rank SVD: bytes per task, error, retained gain.

    original ──encode──▶ bytes ──decode──▶ PEFT folder ──▶ measured as every source is

Nothing is stored. What a method shares between tasks, it prepares from all tasks of the base model that still have
their originals, one adapter at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import relative_dw_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.likelihood import NllResult
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import baseline_named
from icmlora.fleet.loading import read_original
from icmlora.fleet.measure import SourceResult, TaskLosses
from icmlora.fleet.stats import BaseModelBill, Bill, TaskBill
from icmlora.formats.peft import load_adapter_folder, save_adapter
from registry.records import AdapterRecord, Rung

if TYPE_CHECKING:
    from icmlora.fleet.evaluate import TaskEvaluated
    from registry.store import Store


@dataclass(frozen=True)
class BaselineResult:
    """One method on one task.

    Attributes:
        size: Bytes stored for this task alone.
        shared_size: Bytes stored once for the fleet.
        fleet_size: Number of tasks that share them.
        loss: On the held-out text.
        retained_gain: None where the original has no gain.
        dw_error: Squared relative error of dW; None where the original is zero.
    """

    size: int
    shared_size: int
    fleet_size: int
    loss: NllResult
    retained_gain: float | None
    dw_error: float | None


class Baselines:
    """Measures other methods on the tasks of one base model.

    Args:
        store: The open store.
        base_model: The base model.
        names: Names of the methods.

    Raises:
        UnknownBaseline: There is no method of that name.
    """

    def __init__(self, store: Store, base_model: str, names: Sequence[str]) -> None:
        self._originals = StoredOriginals(store, base_model)
        self._methods: dict[str, Baseline] = {name: baseline_named(name) for name in names}
        self._shared: dict[str, bytes] = {}

    def measure(self, task: str, losses: TaskLosses, sources: Mapping[Rung, SourceResult]) -> dict[str, BaselineResult]:
        """Measure every method on one task; none if its original was evicted.

        Args:
            task: The task's name.
            losses: What measures it.
            sources: Its results, base model and original among them.

        Raises:
            DataError: A loss that is not a number.
        """
        if not self._methods or task not in self._originals:
            return {}
        base, original = sources["base"].nats_per_token, sources["original"].nats_per_token
        adapter = self._originals[task]
        results = {}
        for name, method in self._methods.items():
            shared = self._prepared(name)
            code = method.encode(adapter, shared)
            with tempfile.TemporaryDirectory(prefix="icm-") as folder:
                written = Path(folder) / "adapter"
                save_adapter(method.decode(code, shared), written, card="", metadata={})
                error = relative_dw_error(adapter, load_adapter_folder(written))
                loss = losses.loss_of(name, written)
            gain = losses.gain(base, original, loss.nats_per_token)
            finite = error if math.isfinite(error) else None
            results[name] = BaselineResult(len(code), len(shared), len(self._originals), loss, gain, finite)
        return results

    def _prepared(self, name: str) -> bytes:
        if name not in self._shared:
            self._shared[name] = self._methods[name].prepare(self._originals)
        return self._shared[name]


class StoredOriginals(Mapping[str, Adapter]):
    """The originals of one base model that the store still has, read each time that one is asked for."""

    def __init__(self, store: Store, base_model: str) -> None:
        rows = (row for row in store.tasks.summaries() if row.task.base_model == base_model)
        self._store = store
        self._finals: dict[str, AdapterRecord] = {row.task.name: row.final for row in rows if not row.final.is_evicted}

    def __getitem__(self, task: str) -> Adapter:
        return read_original(self._store, self._finals[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._finals)

    def __len__(self) -> int:
        return len(self._finals)


@dataclass(frozen=True)
class MethodSummary:
    """One method over the tasks that it was measured on.

    Attributes:
        method: A source or a baseline.
        tasks: How many.
        task_size: Mean bytes per task, including its part of what is stored once.
        marginal_size: Mean bytes of one more task.
        share: `task_size` as a share of bf16.
        dw_error: Mean squared relative error of dW; None where none was measured.
        mean: Mean retained gain; None where no original has a gain.
        worst: Smallest retained gain.
        worst_task: The task that has it.
    """

    method: str
    tasks: int
    task_size: float
    marginal_size: float
    share: float
    dw_error: float | None
    mean: float | None
    worst: float | None
    worst_task: str | None


@dataclass(frozen=True)
class _Cell:
    """One method on one task; sizes in bytes."""

    task: str
    bf16: int
    marginal: float
    shared: float
    gain: float | None
    dw_error: float | None


def compare(tasks: Sequence[TaskEvaluated], bill: Bill) -> list[MethodSummary]:
    """Sum up all baselines, and the sources that take bytes, largest first.

    A task that is not in the bill is left out: it was removed since it was measured.
    """
    bills = {task.task: (fleet, task) for fleet in bill.fleets for task in fleet.tasks}
    cells: defaultdict[str, list[_Cell]] = defaultdict(list)
    for done in tasks:
        if done.task in bills:
            for method, cell in _cells(done, *bills[done.task]):
                cells[method].append(cell)
    return sorted((_summary(method, found) for method, found in cells.items()), key=lambda row: -row.task_size)


def _cells(done: TaskEvaluated, fleet: BaseModelBill, task: TaskBill) -> Iterator[tuple[str, _Cell]]:
    code = (task.code_size or 0) + task.vectors_size
    sizes: dict[Rung, int] = {"residual": task.size, "code": code, "generate": task.vectors_size}
    for source, size in sizes.items():
        if source in done.sources:
            shared = fleet.generator_size / max(len(fleet.encoded), 1)
            found = done.sources[source]
            yield source, _Cell(done.task, task.bf16_size, size, shared, found.retained_gain, found.dw_error)
    for name, result in done.baselines.items():
        shared = result.shared_size / result.fleet_size
        yield name, _Cell(done.task, task.bf16_size, result.size, shared, result.retained_gain, result.dw_error)


def _summary(method: str, cells: list[_Cell]) -> MethodSummary:
    count = len(cells)
    total = sum(cell.marginal + cell.shared for cell in cells)
    errors = [cell.dw_error for cell in cells if cell.dw_error is not None]
    gains = [(cell.gain, cell.task) for cell in cells if cell.gain is not None]
    worst, worst_task = min(gains, default=(None, None))
    return MethodSummary(
        method=method,
        tasks=count,
        task_size=total / count,
        marginal_size=sum(cell.marginal for cell in cells) / count,
        share=total / max(sum(cell.bf16 for cell in cells), 1),
        dw_error=math.fsum(errors) / len(errors) if errors else None,
        mean=math.fsum(gain for gain, _ in gains) / len(gains) if gains else None,
        worst=worst,
        worst_task=worst_task,
    )
