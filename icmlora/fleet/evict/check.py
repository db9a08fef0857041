"""Check that the code of a task can replace its original, as it is on disk. Any failure keeps the original.

code, residual, generator    read, decoded and measured against the original
configuration                read, and compared with its digest
other tensors, such as heads read, unpacked and compared with those of the original, byte for byte
files that came with it      read, and compared with their digests
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.errors import Cancelled
from icmlora.fleet.evict.types import NOT_MEASURED, CheckFailed, Limits
from icmlora.fleet.failures import FAILURES, as_error
from icmlora.fleet.measure.measure import losses_on_own_text
from icmlora.fleet.resources.decoding import check_references, decode_code, read_form
from icmlora.fleet.resources.loading import Models, read_with_extras
from registry.errors import DamagedStore, StoreIOError
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, NewEvaluation, TaskRecord
from registry.tables.evaluations import latest

if TYPE_CHECKING:
    from icmlora.formats.format import LoadedAdapter
    from registry.store import Store


@dataclass(frozen=True)
class Checked:
    """What was measured of a code that met the limits, and what the store records of it."""

    squared_error: float
    retained_gain: float | None = None
    precision: str | None = None  # of the base model that the gain was measured on
    evaluations: tuple[NewEvaluation, ...] = ()


@dataclass(frozen=True)
class EvictionCheck:
    """Measures codes against their originals."""

    store: Store
    models: Models
    limits: Limits

    def run(self, task: TaskRecord, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> Checked:
        """Check a code, with its residual if it has one, and what is kept in addition to it."""
        check_bytes(self.store, final)
        error = self._squared_error(final, code, generator)
        self.limits.check_error(error)
        if self.limits.min_gain is None:
            return Checked(error)
        if task.eval_data is None:
            raise CheckFailed("it has no held-out text, so its retained gain is unknown", error)
        try:
            losses = losses_on_own_text(self.store, self.models, task, generator)
            # Measure everything again, also the original: this is the last time that it can be measured.
            results = losses.measure((code.rung,), again=True)
        except Cancelled:
            raise
        except FAILURES as failure:
            found = as_error(failure, self.models.loaded(task.base_model))
            raise CheckFailed(f"it cannot be measured: {found.message}", error) from failure
        gain = results[code.rung].retained_gain if code.rung in results else None
        if gain is None:
            fact = "its original is no better than the base model on its held-out text, so there is no gain to keep"
            raise CheckFailed(fact, error)
        self.limits.check_gain(gain, error, losses.precision)
        return Checked(error, gain, losses.precision, tuple(map(losses.record_of, results.values())))

    def _squared_error(self, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> float:
        generator_file = self.models.generator_file(generator)
        original = None if final.is_evicted else read_with_extras(self.store, final)
        if original is not None and not self._has_tensors_of(original, final):
            raise CheckFailed("the tensors kept in addition to its code are not those of its original")
        try:
            decoded = decode_code(self.store, generator_file, code, code.rung)
            # If only later checkpoints are left, what was measured when the final original went still holds.
            error = code.best_squared_error if original is None else squared_error(original.adapter, decoded)
        except DamagedStore:
            raise
        except Exception as failure:  # nothing that a decoder does may cost the original
            fact = f"its code cannot be decoded: {type(failure).__name__}: {failure}"
            raise CheckFailed(fact) from failure
        if error is None:
            raise CheckFailed(NOT_MEASURED)
        if not math.isfinite(error):
            raise CheckFailed("the relative error of its code is not a finite number")
        return error

    def _has_tensors_of(self, original: LoadedAdapter, final: AdapterRecord) -> bool:
        """Say whether the tensors kept in addition to a code are those of the original, byte for byte."""
        if not final.extras and not original.extras:  # most have none
            return True
        return read_form(self.store, final).tensors == original.extras


def recorded_gain(
    store: Store, task: TaskRecord, code: CodeRecord, generator: GeneratorRecord
) -> tuple[float | None, str | None]:
    """Return the retained gain that was measured of a code, if it was, and in which precision of the base model."""
    found = latest(store.evaluations.all(task.name), task, code.rung, generator)
    return (None, None) if found is None else (found.retained_gain, found.precision)


def check_recorded(
    store: Store, task: TaskRecord, final: AdapterRecord, limits: Limits, code: CodeRecord, generator: GeneratorRecord
) -> None:
    """Check the code of an original that is gone by what was measured of it, and that it can still be decoded.

    Raises:
        CheckFailed: It misses a limit, or was not measured.
        DamagedStore: Bytes are missing or damaged.
    """
    limits.check_error(code.best_squared_error)
    gain, precision = recorded_gain(store, task, code, generator)
    limits.check_gain(gain, code.best_squared_error, precision)
    check_bytes(store, final, [generator.blob, *code.digests()])
    check_references(store, final)


def check_bytes(store: Store, row: AdapterRecord, source: Sequence[str] = ()) -> None:
    """Check all bytes that bring an adapter back: those of its source, its configuration and its extras.

    Raises:
        DamagedStore: Bytes of its source are missing or damaged.
        CheckFailed: Bytes of its configuration or its extras are, or cannot be read.
    """
    for digest in source:
        store.blobs.check(digest)
    parts = [("its configuration", row.config)]
    parts += [(extra.file or "a tensor kept in addition to its code", extra.blob) for extra in row.extras]
    for what, digest in parts:
        try:
            store.blobs.check(digest)
        except (DamagedStore, StoreIOError) as error:
            raise CheckFailed(f"{what} could not be brought back: {error}") from error
