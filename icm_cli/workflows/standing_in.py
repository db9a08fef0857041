"""Whether a task's code may stand in for its original: read again from disk, decoded and measured, now.

    generator ─┐
    code ──────┤ digest
    residual ──┴ checked ──decode──▶ adapter ── dW error against the stored original
                                        └─ written ──PEFT──▶ retained gain on the task's held-out text

What a code is, and how it is decoded, is the codec's business; whatever goes wrong in there keeps the original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icm_cli.workflows.beside import decode_rung
from icm_cli.workflows.kept import Kept
from icm_cli.workflows.plain_copy import read_original
from icm_cli.workflows.task_evaluation import on_own_text
from icmlora.device import resolve_device
from icmlora.errors import DataError
from icmlora.metrics import relative_dw_error
from registry.errors import DamagedStore
from registry.records import AdapterRecord, CodeRecord, GeneratorRecord, NewEvaluation, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class Measured:
    """What was measured of a code, and what of it is to be recorded."""

    dw_error: float
    retained_gain: float | None
    evaluations: tuple[NewEvaluation, ...]


class CannotStandIn(DataError):
    """A code that does not keep what was asked for, or of which that is not known.

    Attributes:
        dw_error: What was measured of it before it failed.
        retained_gain: Likewise.
    """

    def __init__(self, reason: str, dw_error: float | None = None, retained_gain: float | None = None) -> None:
        super().__init__(reason)
        self.dw_error, self.retained_gain = dw_error, retained_gain


class StandInCheck:
    """Measures one task after the other; the latest generator and base model are kept, adapters are not.

    Args:
        store: The open store.
        max_error: Largest relative dW error, or None for any.
        min_gain: Smallest retained gain, or None for any; it is then not measured.
        device: Where to measure the gain.
    """

    def __init__(self, store: Store, *, max_error: float | None, min_gain: float | None, device: str) -> None:
        self._store, self._max_error, self._min_gain = store, max_error, min_gain
        self._kept = Kept(store, resolve_device(device))

    def measure(self, task: TaskRecord, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> Measured:
        """Measure a code, with its residual if it has one, against the original, which is in the store.

        Raises:
            CannotStandIn: It does not keep the limits, or cannot be decoded.
            DamagedStore: Generator, code, residual, original or text are not the bytes that were stored.
            IcmLoraError: Generator, base model or text cannot be used.
        """
        error = self._dw_error(final, code, generator)
        if self._max_error is not None and error > self._max_error:
            raise CannotStandIn(f"its relative dW error is {error:.4f}; {self._max_error:g} is allowed", error)
        if self._min_gain is None:
            return Measured(error, None, ())
        return self._with_gain(task, code, generator, error, self._min_gain)

    def _dw_error(self, final: AdapterRecord, code: CodeRecord, generator: GeneratorRecord) -> float:
        lineage = self._kept.lineage(generator)
        original = None if final.is_evicted else read_original(self._store, final)
        try:
            decoded = decode_rung(self._store, lineage, code, code.rung)
            # Without the original (only later checkpoints are left) what was measured when it went stands.
            error = code.best_error if original is None else relative_dw_error(original, decoded)
        except DamagedStore:
            raise
        except Exception as failure:  # the last look at the original: nothing that a decoder does may cost it
            fact = f"its code cannot be decoded: {type(failure).__name__}: {failure}"
            raise CannotStandIn(fact) from failure
        if error is None or not math.isfinite(error):
            raise CannotStandIn("the relative dW error of its code is no number")
        return error

    def _with_gain(
        self, task: TaskRecord, code: CodeRecord, generator: GeneratorRecord, error: float, limit: float
    ) -> Measured:
        if task.eval_data is None:
            raise CannotStandIn("it has no held-out text, so its retained gain is not known", error)
        work = on_own_text(self._store, self._kept.base(task.base_model), task, generator)
        # Everything anew, the original too: it is the last time that it can be measured.
        results = work.run((code.rung,), again=True, record=False)
        gain = results[code.rung].retained_gain if code.rung in results else None
        if gain is None:
            raise CannotStandIn("its original does not help on its held-out text, so there is no gain to keep", error)
        if not gain >= limit:
            raise CannotStandIn(f"its retained gain is {gain:.4f}; {limit:g} is asked for", error, gain)
        return Measured(error, gain, tuple(map(work.evaluation_of, results.values())))
