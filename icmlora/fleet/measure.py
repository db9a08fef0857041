"""One task on one set of texts: every rung that exists, or what was recorded of it before.

Every adapter is written to a folder and loaded by PEFT before it is measured: what counts is what a user would get.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import relative_dw_error
from icmlora.base_models.attach import adapted
from icmlora.base_models.examples import EvaluationData
from icmlora.base_models.likelihood import NllResult
from icmlora.base_models.modality import BaseModel, retained_gain
from icmlora.errors import DataError, NotCovered
from icmlora.fleet.context import with_files
from icmlora.fleet.loading import read_original, write_plain_copy
from icmlora.fleet.materialize import MaterializeRequest, write_rung
from icmlora.formats.peft import PEFT, load_adapter_folder
from registry.evaluations import Subject
from registry.records import EvaluationRecord, GeneratorRecord, NewEvaluation, Rung, TaskRecord

if TYPE_CHECKING:
    from registry.store import Store

MAX_TOKENS = 256
"""Tokens scored of each text, unless something else is asked for."""
RUNGS: tuple[Rung, ...] = ("base", "original", "residual", "code", "generate")


@dataclass(frozen=True)
class RungResult:
    """One rung of one task, measured on one set of texts."""

    rung: Rung
    nats_per_token: float
    tokens: int
    utf8_bytes: int
    retained_gain: float | None
    dw_error: float | None

    def as_loss(self) -> NllResult:
        """Return the loss with its perplexity and bits per byte."""
        return NllResult(self.nats_per_token * self.tokens, self.tokens, self.utf8_bytes)


def own_text(store: Store, base: BaseModel, task: TaskRecord) -> EvaluationData:
    """Read the held-out text that a task has.

    Raises:
        DataError: The text cannot be used.
    """
    content = store.blobs.read(str(task.eval_data))
    return EvaluationData.parse(content, path=task.name, read=base.modality.read_examples)


def on_own_text(store: Store, base: BaseModel, task: TaskRecord, generator: GeneratorRecord) -> TaskEvaluation:
    """Measure a task on the held-out text that it has, as `icm eval` does by default, under a generator.

    Raises:
        DataError: The text cannot be used.
    """
    return TaskEvaluation(store, base, task, own_text(store, base, task), MAX_TOKENS, generator)


class TaskEvaluation:
    """Measures a task on one set of texts; base and original first, since every gain is relative to them.

    Adapter and generator are those of the beginning, a code is read when its turn comes. Others may replace any of them
    meanwhile; what was measured of it is then not recorded.

    Args:
        store: The open store.
        base: The task's base model.
        task: The task.
        data: Held-out text.
        max_tokens: Tokens scored of each text.
        generator: Of the rungs that need one; the current one if none is given.

    Attributes:
        is_outdated: Whether anything was measured and not recorded.
    """

    def __init__(
        self,
        store: Store,
        base: BaseModel,
        task: TaskRecord,
        data: EvaluationData,
        max_tokens: int,
        generator: GeneratorRecord | None = None,
    ) -> None:
        self._store, self._base, self._task, self._data, self._max_tokens = store, base, task, data, max_tokens
        self._generator = generator or store.generators.current(task.base_model)
        self._final = store.tasks.final(task.name)
        self._is_evicted = self._final.is_evicted
        self.is_outdated = False
        self._settings: dict[str, object] = {
            "max_tokens": max_tokens,
            "dtype": base.dtype,
            "base": base.fingerprint,
        }

    def run(self, rungs: Sequence[Rung], *, again: bool, record: bool = True) -> Mapping[Rung, RungResult]:
        """Measure rungs where they exist, and base and original in any case; each is recorded at once.

        An original that was evicted is not measured: what was recorded of it counts, if it was on the same text.

        Args:
            rungs: Which ones.
            again: Also what was measured before on the same text, in the same way.
            record: Whether to record; :meth:`evaluation_of` says what.

        Raises:
            DataError: A loss that is no number.
        """
        recorded = self._recorded()
        known = {rung: recorded[rung] for rung in recorded if not again or (rung == "original" and self._is_evicted)}
        results: dict[Rung, RungResult] = {}
        for rung in RUNGS:
            if rung not in {"base", "original", *rungs}:
                continue
            if rung in known:
                results[rung] = self._completed(known[rung], results, record=record)
                continue
            try:
                measured = self._measure(rung, results)
            except NotCovered:  # a task that was ingested after the last training, with modules of its own
                continue
            if measured is None:
                continue
            results[rung], seen = measured
            if record and not self._store.evaluations.add([self.evaluation_of(results[rung])], of=seen):
                self.is_outdated = True
        return results

    def gain(self, base: float, original: float, other: float) -> float | None:
        """Return the retained gain of an adapter, from the metric of the base model, with the original and with it."""
        return retained_gain(base, original, other, higher_is_better=self._base.modality.metric.higher_is_better)

    def result_of(
        self, rung: Rung, loss: NllResult, error: float | None, before: Mapping[Rung, RungResult]
    ) -> RungResult:
        """Return a loss with its retained gain, if the results `before` it have those of base and original."""
        gain = None
        if rung not in ("base", "original") and "original" in before:
            base, original = before["base"], before["original"]
            gain = self.gain(base.nats_per_token, original.nats_per_token, loss.nats_per_token)
        return RungResult(rung, loss.nats_per_token, loss.tokens, loss.utf8_bytes, gain, error)

    def loss_of(self, label: str, written: Path) -> NllResult:
        """Measure an adapter that was written to a folder, and record nothing.

        Args:
            label: What to call it in an error.
            written: The folder, loaded by PEFT.

        Raises:
            DataError: A loss that is no number.
        """
        with adapted(self._base, written):
            return self._loss(label)

    def _completed(self, known: RungResult, before: Mapping[Rung, RungResult], *, record: bool) -> RungResult:
        """Add the retained gain to what was measured while the original was evicted, once that is back."""
        gain = self.result_of(known.rung, known.as_loss(), known.dw_error, before).retained_gain
        if known.retained_gain is not None or gain is None:
            return known
        found = replace(known, retained_gain=gain)
        if record:
            self._store.evaluations.add([self.evaluation_of(found)], of=self._seen())
        return found

    def _seen(self) -> Subject:
        """Return what there is to measure."""
        generator = self._generator
        code = None if generator is None else self._store.codes.get(self._task.name, generator.id)
        return Subject(self._final, generator, code)

    def _exists(self, rung: Rung, seen: Subject) -> bool:
        if rung in ("residual", "code"):
            return seen.code is not None and (rung == "code" or seen.code.residual is not None)
        if rung == "generate":
            return self._generator is not None and bool(self._store.vectors.all(self._task.name))
        return not self._is_evicted

    def _measure(self, rung: Rung, before: Mapping[Rung, RungResult]) -> tuple[RungResult, Subject] | None:
        """Return a result, and what it is of; None where there is no such rung."""
        if rung == "base":
            return self.result_of(rung, self._loss(rung), None, before), self._seen()
        with tempfile.TemporaryDirectory(prefix="icm-") as folder:
            written = Path(folder) / "adapter"
            seen = with_files(self._seen, lambda row: self._write(rung, row, written))
            if seen is None:
                return None
            error = None if rung == "original" else self._dw_error(rung, written, seen)
            return self.result_of(rung, self.loss_of(rung, written), error, before), seen

    def _write(self, rung: Rung, seen: Subject, folder: Path) -> Subject | None:
        """Write a rung for PEFT to load, and return what was written; None where there is no such rung."""
        if not self._exists(rung, seen):
            return None
        if rung == "original":
            write_plain_copy(self._store, seen.final, folder)
        elif rung != "base":
            request = MaterializeRequest(task=self._task.name, directory=folder, source=rung)
            write_rung(self._store, request, seen, PEFT)
        return seen

    def _loss(self, label: str) -> NllResult:
        loss = NllResult.of(self._base.modality.measure(self._base, self._data.examples, self._max_tokens))
        if not math.isfinite(loss.nats):
            fact = (
                f"the loss of {self._task.name!r} ({label}) is not a number: its values overflow in {self._base.dtype}"
            )
            raise DataError(fact, hint="the training run diverged: take an earlier checkpoint")
        return loss

    def _dw_error(self, rung: Rung, written: Path, seen: Subject) -> float | None:
        if self._is_evicted:  # of what stands in, the error was measured before the original went
            code = seen.code
            if code is None or rung not in ("residual", "code"):
                return None
            return code.dw_error if rung == "code" else code.best_error
        error = relative_dw_error(read_original(self._store, self._final), load_adapter_folder(written))
        return error if math.isfinite(error) else None  # an original of zeros has no relative error

    def _recorded(self) -> dict[Rung, RungResult]:
        """Return what was measured before on the same text, in the same way, of the same adapter and generator."""
        rows = [row for row in self._store.evaluations.all(self._task.name) if self._is_current(row)]
        return {
            row.rung: RungResult(
                row.rung, row.nats_per_token, row.tokens, row.utf8_bytes, row.retained_gain, row.dw_error
            )
            for row in rows
        }

    def _is_current(self, row: EvaluationRecord) -> bool:
        made_by = self._made_by(row.rung)
        return (row.data, row.generator_id, dict(row.settings)) == (self._data.digest, made_by, self._settings)

    def _made_by(self, rung: Rung) -> int | None:
        return self._generator.id if self._generator is not None and rung in ("residual", "code", "generate") else None

    def evaluation_of(self, result: RungResult) -> NewEvaluation:
        """Return what is recorded of a result."""
        return NewEvaluation(
            task=self._task.name,
            rung=result.rung,
            generator_id=self._made_by(result.rung),
            data=self._data.digest,
            nats_per_token=result.nats_per_token,
            tokens=result.tokens,
            utf8_bytes=result.utf8_bytes,
            retained_gain=result.retained_gain,
            dw_error=result.dw_error,
            settings=self._settings,
        )
