"""Every operating point on every task: bytes, squared error, loss of what comes back from the bytes."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import Score, retained_gain
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from tests.benchmarks.rate_distortion.cache import Cache
from tests.benchmarks.rate_distortion.fleet import FleetFolder
from tests.benchmarks.rate_distortion.judging import Judge, weights_digest
from tests.benchmarks.rate_distortion.method import Coded, Point

# A squared error that float64 cannot tell from none: the adapter is the original.
_NOTHING = 1e-13
_ORIGINAL = "original"


@dataclass(frozen=True)
class TaskResult:
    """One task at one point; the gain is None where the original has none."""

    task: str
    size: int
    bf16_size: int
    dw_error: float
    nats_per_token: float
    retained_gain: float | None


@dataclass(frozen=True)
class PointResult:
    """One point over the fleet."""

    family: str
    name: str
    shared: int
    tasks: tuple[TaskResult, ...]
    notes: dict[str, Any]


class Study:
    """Runs points over one fleet.

    Args:
        fleet: The adapters.
        judge: What measures them.
        cache: Where everything is kept that a killed run need not do again.
        work: A folder for what methods keep between runs.
    """

    def __init__(self, fleet: FleetFolder, judge: Judge, cache: Cache, work: Path) -> None:
        self._fleet, self._judge, self._cache, self._work = fleet, judge, cache, work
        self._ends: dict[str, tuple[Score, Score]] = {}

    def run(self, points: Iterable[Point]) -> Iterator[PointResult]:
        """Yield the result of each point."""
        for point in points:
            identity = hashlib.sha256(f"{point.method.identity()} {self._fleet.digest}".encode()).hexdigest()[:16]
            self._finish(point, identity)
            yield self._result(point, identity)

    def _finish(self, point: Point, identity: str) -> None:
        """Do what the cache lacks of a point; the fleet is encoded only if something is missing."""
        missing = [task for task in self._fleet if not self._is_done(identity, task)]
        if not missing:
            return
        coded = point.method.code(self._fleet, self._work / identity)
        for task in missing:
            self._do(coded, identity, task)

    def _is_done(self, identity: str, task: str) -> bool:
        record = self._cache.get("coded", identity, task)
        return record is not None and (
            record["weights"] == _ORIGINAL or self._judge.known(task, record["weights"]) is not None
        )

    def _do(self, coded: Coded, identity: str, task: str) -> None:
        original = self._fleet[task]
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            _write(coded.decode(task), written)
            error = squared_error(original, load_adapter(written))
            if not math.isfinite(error):
                raise SystemExit(f"the original of {task} is zero")
            weights = _ORIGINAL
            if error > _NOTHING:
                self._judge.loss(task, written)
                weights = weights_digest(written)
        sizes = {"size": coded.sizes[task], "shared": coded.shared, "notes": dict(coded.notes)}
        self._cache.add("coded", identity, task, **sizes, dw_error=error, weights=weights)

    def _result(self, point: Point, identity: str) -> PointResult:
        records = {task: self._cache.get("coded", identity, task) or {} for task in self._fleet}
        first = next(iter(records.values()))
        tasks = tuple(self._task(task, record) for task, record in records.items())
        return PointResult(point.family, point.name, first["shared"], tasks, first["notes"])

    def _task(self, task: str, record: dict[str, Any]) -> TaskResult:
        base, original = self.ends(task)
        known = None if record["weights"] == _ORIGINAL else self._judge.known(task, record["weights"])
        loss = (known or original).value
        gain = retained_gain(base.value, original.value, loss)
        return TaskResult(task, record["size"], self._fleet.bf16_sizes[task], record["dw_error"], loss, gain)

    def ends(self, task: str) -> tuple[Score, Score]:
        """Return the losses of the base model and of the original, which every gain is relative to."""
        if task not in self._ends:
            with tempfile.TemporaryDirectory(prefix="icm-") as folder:
                written = Path(folder) / "adapter"
                _write(self._fleet[task], written, "float32")
                self._ends[task] = self._judge.loss(task, None), self._judge.loss(task, written)
        return self._ends[task]


def _write(adapter: Adapter, folder: Path, dtype: str = "bfloat16") -> None:
    save_adapter(adapter, folder, dtype=dtype)
