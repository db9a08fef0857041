"""Measure the sources of one task on held-out text.

    base model, original, code, recalled, network
       └─ written in the form of the original ──PEFT──▶ base model with adapter ──▶ nats per token ──▶ retained gain

Every adapter is written, read and loaded with PEFT before it is measured, so the figures are those of what a user gets,
rounding to the original's type and its heads and biases included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import EvaluationData
from icmlora.base_models.modality import retained_gain
from icmlora.errors import DataError, NotCovered
from icmlora.fleet.measure.metric_result import MAX_TOKENS, MetricResult, source_name
from icmlora.fleet.resources.decoding import OriginalForm, decode_code, predict_adapter, read_form
from icmlora.fleet.resources.loading import Models, read_original, read_runnable
from icmlora.fleet.resources.texts import own_text
from icmlora.formats.format import RunnableAdapter
from registry.records import (
    AdapterRecord,
    CodeRecord,
    GeneratorRecord,
    NewEvaluation,
    Rung,
    TaskRecord,
    WithRelativeError,
)

if TYPE_CHECKING:
    from registry.store import Store

SOURCES: tuple[Rung, ...] = ("base", "original", "code", "generate", "network")
"""In the order in which they are measured: every gain needs the losses of base model and original."""


@dataclass(frozen=True)
class SourceResult(WithRelativeError):
    """What was measured of one source of a task on one set of texts."""

    source: Rung
    score: MetricResult
    retained_gain: float | None  # None for base model and original, and where the original has no gain
    squared_error: float | None  # None where there is none


@dataclass(frozen=True)
class Measurement:
    """A result that is still to be recorded, with the adapter and the code that the task had then."""

    new: NewEvaluation
    of: AdapterRecord
    code: CodeRecord | None


def record_measurements(store: Store, made: Sequence[Measurement]) -> bool:
    """Record results, without those whose adapter or code was replaced meanwhile; return whether none was."""
    left_out = [one for one in made if not store.evaluations.add([one.new], of=one.of, code=one.code)]
    return not left_out


def losses_on_own_text(store: Store, models: Models, task: TaskRecord, generator: GeneratorRecord) -> TaskLosses:
    """Prepare to measure a task on its own held-out text, as `icm eval` does; raises `DataError` without one."""
    if task.eval_data is None:  # before the base model is loaded
        raise DataError("it has no held-out text, so its retained gain cannot be measured")
    text = own_text(store, task, models.base(task.base_model))
    return TaskLosses(store, models, task, text, MAX_TOKENS, generator)


class TaskLosses:
    """Measures one task on one set of texts. It writes nothing: `made` has what is to be recorded of it."""

    def __init__(
        self,
        store: Store,
        models: Models,
        task: TaskRecord,
        text: EvaluationData,
        max_tokens: int,
        generator: GeneratorRecord | None = None,
    ) -> None:
        self._store, self._models, self._task, self._text = store, models, task, text
        self._base = models.base(task.base_model)
        self._max_tokens = self._base.within(max_tokens)
        self._generator = generator or store.generators.current(task.base_model)
        # Results are recorded only while the task still has this adapter and generator; see `record_measurements`.
        self._final = store.tasks.final(task.name)
        self._settings: dict[str, object] = {
            "max_tokens": self._max_tokens,
            "dtype": self._base.dtype,
            "base": self._base.fingerprint,
        }
        if text.template is not None:
            self._settings["template"] = text.template
        self.made: list[Measurement] = []

    @property
    def precision(self) -> str:
        """The precision of the base model."""
        return self._base.dtype

    def behind(
        self, context: EvaluationData, sources: Sequence[Rung], references: Mapping[Rung, SourceResult]
    ) -> dict[Rung, SourceResult]:
        """Measure the same on the same texts behind a context; gains are shares of that of the original alone.

        `references` has what was measured of base model and original without it.
        """
        behind = TaskLosses(self._store, self._models, self._task, context, self._max_tokens, self._generator)
        results = behind.measure(sources)
        return {name: replace(one, retained_gain=self._gain(one.score, references)) for name, one in results.items()}

    def measure(self, sources: Sequence[Rung], *, again: bool = False) -> dict[Rung, SourceResult]:
        """Measure base model and original, and some other sources where they exist."""
        # What was measured before in the same way is kept. For an evicted original there is nothing else.
        known = self._recorded()
        if again:
            known = {name: row for name, row in known.items() if name == "original" and self._final.is_evicted}
        results: dict[Rung, SourceResult] = {}
        for source in SOURCES:
            if source not in {"base", "original", *sources}:
                continue
            if source in known:
                results[source] = self._completed(known[source], results)
                continue
            code = self._code()
            if not self._exists(source, code):
                continue
            try:
                result = self._measured(source, code, results)
            except NotCovered:  # ingested after the last training, with modules or ranks of its own
                continue
            results[source] = result
            self._keep(result, code)
        return results

    def measure_adapter(self, source: Rung, adapter: Adapter, squared_error: float) -> SourceResult:
        """Measure an adapter that is not in the store, and record nothing."""
        return self.result_of(source, self.score_of(source, self.written(adapter)), squared_error, self._references)

    def written(self, adapter: Adapter) -> RunnableAdapter:
        """Write a decoded adapter as `icm materialize` does, and read it again."""
        return self._form.runnable(adapter)

    def score_of(self, label: str, adapter: RunnableAdapter) -> MetricResult:
        """Load an adapter with PEFT, measure it, and record nothing."""
        from icmlora.base_models.running.attach import adapted  # imports peft, which takes seconds

        with adapted(self._base, adapter):
            return self._score(label)

    def result_of(
        self, source: Rung, score: MetricResult, squared_error: float | None, references: Mapping[Rung, SourceResult]
    ) -> SourceResult:
        """Return the result of a source, with its retained gain where base model and original are in `references`."""
        gain = None if source in ("base", "original") else self._gain(score, references)
        return SourceResult(source, score, gain, squared_error)

    def _gain(self, score: MetricResult, references: Mapping[Rung, SourceResult]) -> float | None:
        if "original" not in references:
            return None
        values = references["base"].score.value, references["original"].score.value, score.value
        return retained_gain(*values, higher_is_better=self._base.modality.metric.higher_is_better)

    def record_of(self, result: SourceResult) -> NewEvaluation:
        """Return what the store records of a result."""
        return NewEvaluation(
            task=self._task.name,
            rung=result.source,
            generator_id=self._generator_of(result.source),
            data=self._text.digest,
            value=result.score.value,
            count=result.score.count,
            utf8_bytes=result.score.utf8_bytes,
            retained_gain=result.retained_gain,
            squared_error=result.squared_error,
            settings=self._settings,
            metric=result.score.metric,
            others=result.score.others,
        )

    @cached_property
    def _references(self) -> Mapping[Rung, SourceResult]:
        """The results of base model and original."""
        return self.measure(())

    @cached_property
    def _form(self) -> OriginalForm:
        return read_form(self._store, self._final)

    @cached_property
    def _original(self) -> Adapter:
        return read_original(self._store, self._final)

    def _code(self) -> CodeRecord | None:
        """Return the current code of the task."""
        return None if self._generator is None else self._store.codes.get(self._task.name, self._generator.id)

    def _exists(self, source: Rung, code: CodeRecord | None) -> bool:
        match source:
            case "base":
                return True
            case "original":
                return not self._final.is_evicted
            case "code":
                return code is not None
            case _:
                return self._generator is not None and bool(self._store.vectors.all(self._task.name))

    def _measured(self, source: Rung, code: CodeRecord | None, references: Mapping[Rung, SourceResult]) -> SourceResult:
        if source == "base":
            return self.result_of(source, self._score(source), None, references)
        if source == "original":
            score = self.score_of(source, read_runnable(self._store, self._final))
            return self.result_of(source, score, None, references)
        written = self.written(self._decoded(source, code))
        error = self._squared_error(source, written, code)
        return self.result_of(source, self.score_of(source, written), error, references)

    def _decoded(self, source: Rung, code: CodeRecord | None) -> Adapter:
        """Decode a code, or make an adapter from the task's vectors."""
        assert self._generator is not None
        generator_file = self._models.generator_file(self._generator)
        if code is not None and source == "code":
            return decode_code(self._store, generator_file, code)
        if source == "generate":
            exemplar = self._models.exemplars(self._generator).code_for(self._final)
            if exemplar is not None:
                return decode_code(self._store, generator_file, exemplar)
        return predict_adapter(self._store, generator_file, self._final, code)

    def _score(self, label: str) -> MetricResult:
        """Measure the base model as it is now, with the adapter that is on it."""
        modality = self._base.modality
        found = modality.measure(self._base, self._text.examples, self._max_tokens)
        if not math.isfinite(found.value):
            name, dtype = modality.metric.name, self._base.dtype
            what = f"the {name} of {self._task.name!r} ({source_name(label)})"
            hint = "the training run diverged: use an earlier checkpoint"
            raise DataError(f"{what} is not a number: values overflow in {dtype}", hint=hint)
        return MetricResult(modality.metric.name, found.value, found.count, found.utf8_bytes, dict(found.others))

    def _squared_error(self, source: Rung, written: RunnableAdapter, code: CodeRecord | None) -> float | None:
        if self._final.is_evicted:  # what was measured when the original went still holds
            return code.squared_error if code is not None and source == "code" else None
        error = squared_error(self._original, written.adapter)
        return error if math.isfinite(error) else None  # an original of zeros has no relative error

    def _completed(self, known: SourceResult, references: Mapping[Rung, SourceResult]) -> SourceResult:
        """Add the retained gain to a result that was measured while the original was evicted."""
        gain = self.result_of(known.source, known.score, known.squared_error, references).retained_gain
        if known.retained_gain is not None or gain is None:
            return known
        found = replace(known, retained_gain=gain)
        self._keep(found, self._code())
        return found

    def _keep(self, result: SourceResult, code: CodeRecord | None) -> None:
        self.made.append(Measurement(self.record_of(result), self._final, code))

    def _recorded(self) -> dict[Rung, SourceResult]:
        """Return what was measured before on the same text, in the same way, of the same generator."""
        return {
            row.rung: SourceResult(row.rung, MetricResult.of(row), row.retained_gain, row.squared_error)
            for row in self._store.evaluations.all(self._task.name)
            if (row.data, dict(row.settings)) == (self._text.digest, self._settings)
            and row.generator_id == self._generator_of(row.rung)
        }

    def _generator_of(self, source: Rung) -> int | None:
        """Return the number of the generator that a source depends on."""
        return None if self._generator is None or source in ("base", "original") else self._generator.id
