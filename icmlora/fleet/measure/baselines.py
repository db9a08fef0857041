"""Measure other methods, such as int8 or a low-rank SVD, on the tasks of a store: bytes, error, retained gain.

    original ──encode──▶ bytes ──decode──▶ adapter files ──▶ measured as every source is

Nothing is stored. If a method shares something between tasks, it prepares that from all tasks of the base model that
still have their originals, one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import baseline_named
from icmlora.errors import DataError
from icmlora.fleet.failures import FAILURES
from icmlora.fleet.measure.measure import SourceResult, TaskLosses
from icmlora.fleet.measure.metric_result import MetricResult
from icmlora.fleet.resources.adapter_source import refuse_large
from icmlora.fleet.resources.loading import read_original
from registry.records import AdapterRecord, Rung, WithRelativeError

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class BaselineResult(WithRelativeError):
    """One method on one task."""

    size: int  # bytes stored for this task alone
    shared_size: int  # bytes stored once for the fleet
    fleet_size: int
    score: MetricResult
    retained_gain: float | None  # None where the original has no gain
    squared_error: float | None  # None where the original is zero


class Baselines:
    """Measures other methods on the tasks of one base model."""

    def __init__(self, store: Store, base_model: str, names: Sequence[str]) -> None:
        self._methods: dict[str, Baseline] = {name: baseline_named(name) for name in names}
        self._originals = StoredOriginals(store, base_model)
        if self._methods:
            self._originals.leave_out_unusable()
        self._shared: dict[str, bytes] = {}

    def measure(self, task: str, losses: TaskLosses, sources: Mapping[Rung, SourceResult]) -> dict[str, BaselineResult]:
        """Measure every method on one task; none if its original was evicted."""
        if not self._methods or task not in self._originals:
            return {}
        base, original = sources["base"].score.value, sources["original"].score.value
        adapter = self._originals[task]
        results = {}
        for name, method in self._methods.items():
            shared = self._prepared(name)
            code = method.encode(adapter, shared)
            try:
                written = losses.written(method.decode(code, shared), "bfloat16")
            except ValueError as error:  # such as the mean of adapters of other modules
                fact = f"what baseline {name!r} makes of it cannot be written in its form: {error}"
                raise DataError(fact, hint="leave out that baseline") from error
            squared = squared_error(adapter, written.adapter)
            score = losses.score_of(name, written)
            gain = losses.gain(base, original, score.value)
            finite = squared if math.isfinite(squared) else None
            results[name] = BaselineResult(len(code), len(shared), len(self._originals), score, gain, finite)
        return results

    def _prepared(self, name: str) -> bytes:
        if name not in self._shared:
            self._shared[name] = self._methods[name].prepare(self._originals)
        return self._shared[name]


class StoredOriginals(Mapping[str, Adapter]):
    """The originals of one base model that the store still has. Each is read when it is asked for."""

    def __init__(self, store: Store, base_model: str) -> None:
        rows = (row for row in store.tasks.summaries() if row.task.base_model == base_model)
        self._store = store
        finals = ((row.task.name, row.final) for row in rows)
        self._finals: dict[str, AdapterRecord] = {name: final for name, final in finals if final.can_be_read}

    def leave_out_unusable(self) -> None:
        """Leave out originals that are damaged or whose values are too large: a method may share them among all."""
        for name in list(self._finals):
            try:
                refuse_large(self[name])
            except FAILURES:  # measuring the task itself says why
                del self._finals[name]

    def __getitem__(self, task: str) -> Adapter:
        return read_original(self._store, self._finals[task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._finals)

    def __len__(self) -> int:
        return len(self._finals)
