"""Measure the sources of one task on held-out text.

    base model, original, code, recalled, network
       └─ written in the form of the original ──PEFT──▶ base model with adapter ──▶ nats per token ──▶ retained gain

Every adapter is written, read and loaded with PEFT before it is measured, so the figures include rounding to the
original's type, and its heads and biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.base_models.modality import retained_gain
from icmlora.base_models.reading import EvaluationData
from icmlora.errors import DataError, NotCovered
from icmlora.fleet.measure.metric_result import MAX_TOKENS, MetricResult
from icmlora.fleet.resources.decoding import OriginalForm, decode_code, predict_adapter, read_form
from icmlora.fleet.resources.loading import ModelCache, read_original, read_runnable
from icmlora.fleet.resources.task_code import is_same_code
from icmlora.fleet.resources.texts import own_text
from icmlora.formats.format import RunnableAdapter
from registry.manifests import Code, Measurement, Source, Task, WithRelativeError

if TYPE_CHECKING:
    from registry.store import Store

SOURCES: tuple[Source, ...] = ("base", "original", "code", "recalled", "network")
"""In the order of measuring: every gain needs the losses of base model and original."""


@dataclass(frozen=True)
class SourceResult(WithRelativeError):
    """The result of one source of a task on one set of texts."""

    source: Source
    score: MetricResult
    retained_gain: float | None  # None for base model and original, and where the original has no gain
    squared_error: float | None  # None where there is none


def record_measurements(store: Store, seen: Task, made: Sequence[Measurement]) -> bool:
    """Record measurements of a task, except of an adapter or a code that was replaced; return whether none was.

    `seen` is the task that was measured. Raises `TaskNotFound` if it was removed.
    """
    holding: list[Measurement] = []

    def change(task: Task) -> Task:
        holding[:] = [one for one in made if _holds(one, seen, task)]
        return replace(task, measured=task.with_measured(*holding))

    store.update(seen.name, change)
    return len(holding) == len(made)


def _holds(one: Measurement, seen: Task, task: Task) -> bool:
    """Return whether a task still has the adapter, and the code, that was measured."""
    if one.source == "base":
        return True
    if not task.final.is_same(seen.final):
        return False
    return one.source != "code" or is_same_code(task.code, seen.code)


def losses_on_own_text(models: ModelCache, task: Task, generator: str) -> TaskLosses:
    """Prepare to measure a task on its own held-out text, as `icm eval` does; raises `DataError` without one."""
    if task.eval_data is None:  # before the base model is loaded
        raise DataError("it has no held-out text, so its retained gain cannot be measured")
    text = own_text(models.store, task, models.base(task.base_model))
    return TaskLosses(models, task, text, MAX_TOKENS, generator)


class TaskLosses:
    """Measures one task on one set of texts, and writes nothing: `made` is to be recorded."""

    def __init__(
        self, models: ModelCache, task: Task, text: EvaluationData, max_tokens: int, generator: str | None = None
    ) -> None:
        self._store, self._models, self.task, self._text = models.store, models, task, text
        self._base = models.base(task.base_model)
        self._max_tokens = self._base.within(max_tokens)
        self._generator = generator  # of a new code that is measured
        current = models.store.generator(task.base_model)
        self._current = None if current is None else str(current.blob)  # the network that predicts
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

    def with_context(
        self, context: EvaluationData, sources: Sequence[Source], references: Mapping[Source, SourceResult]
    ) -> dict[Source, SourceResult]:
        """Measure the same texts after a context; gains are shares of the gain of the original alone.

        `references` has the results of base model and original without it.
        """
        results = TaskLosses(self._models, self.task, context, self._max_tokens).measure(sources)
        return {name: replace(one, retained_gain=self._gain(one.score, references)) for name, one in results.items()}

    def measure(self, sources: Sequence[Source], *, again: bool = False) -> dict[Source, SourceResult]:
        """Measure base model and original, and some other sources where they exist."""
        # Earlier measurements of the same kind are kept. For an evicted original there is nothing else.
        results: dict[Source, SourceResult] = {}
        for source in SOURCES:
            if source not in {"base", "original", *sources}:
                continue
            known = (
                self._recorded(source) if not again or (source == "original" and self.task.final.is_evicted) else None
            )
            if known is not None:
                results[source] = self._completed(known, results)
                continue
            if not self._exists(source):
                continue
            try:
                result = self._measured(source, results)
            except NotCovered:  # ingested after the last training, with modules or ranks of its own
                continue
            results[source] = result
            self.made.append(self.record_of(result))
        return results

    def written(self, adapter: Adapter) -> RunnableAdapter:
        """Write a decoded adapter as `icm materialize` does, and read it again."""
        return self._form.runnable(adapter)

    def score_of(self, label: str, adapter: RunnableAdapter) -> MetricResult:
        """Load an adapter with PEFT, measure it, and record nothing."""
        from icmlora.base_models.running.attach import adapted  # imports peft, which takes seconds

        with adapted(self._base, adapter):
            return self._score(label)

    def result_of(
        self,
        source: Source,
        score: MetricResult,
        squared_error: float | None,
        references: Mapping[Source, SourceResult],
    ) -> SourceResult:
        """Return the result of a source, with its retained gain where base model and original are in `references`."""
        gain = None if source in ("base", "original") else self._gain(score, references)
        return SourceResult(source, score, gain, squared_error)

    def _gain(self, score: MetricResult, references: Mapping[Source, SourceResult]) -> float | None:
        if "original" not in references:
            return None
        values = references["base"].score.value, references["original"].score.value, score.value
        return retained_gain(*values, higher_is_better=self._base.modality.metric.higher_is_better)

    def record_of(self, result: SourceResult) -> Measurement:
        """Return a result as it is recorded."""
        return Measurement(
            source=result.source,
            generator=self._generator_of(result.source),
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
    def _form(self) -> OriginalForm:
        return read_form(self._store, self.task)

    @cached_property
    def _original(self) -> Adapter:
        return read_original(self._store, self.task.final)

    def _exists(self, source: Source) -> bool:
        match source:
            case "base":
                return True
            case "original":
                return not self.task.final.is_evicted
            case "code":
                return self.task.code is not None
            case _:
                return self._current is not None and bool(self.task.vectors)

    def _measured(self, source: Source, references: Mapping[Source, SourceResult]) -> SourceResult:
        if source == "base":
            return self.result_of(source, self._score(source), None, references)
        if source == "original":
            score = self.score_of(source, read_runnable(self._store, self.task.final))
            return self.result_of(source, score, None, references)
        written = self.written(self._decoded(source))
        error = self._squared_error(source, written)
        return self.result_of(source, self.score_of(source, written), error, references)

    def _decoded(self, source: Source) -> Adapter:
        """Decode a code, or predict an adapter from the task's vectors."""
        generator, code = self._generator_of(source), self._code_of(source)
        assert generator is not None
        generator_file = self._models.generator_file(generator)
        if code is not None:
            return decode_code(self._store, generator_file, code)
        return predict_adapter(self._store, generator_file, self.task)

    def _score(self, label: str) -> MetricResult:
        """Measure the base model as it is now, with the adapter that is on it."""
        modality = self._base.modality
        found = modality.measure(self._base, self._text.examples, self._max_tokens)
        if not math.isfinite(found.value):
            name, dtype = modality.metric.name, self._base.dtype
            what = f"the {name} of {self.task.name!r} ({label})"
            hint = "the training run diverged: use an earlier checkpoint"
            raise DataError(f"{what} is not a number: values overflow in {dtype}", hint=hint)
        return MetricResult(modality.metric.name, found.value, found.count, found.utf8_bytes, dict(found.others))

    def _squared_error(self, source: Source, written: RunnableAdapter) -> float | None:
        if self.task.final.is_evicted:  # the error measured before the eviction still holds
            return self.task.code.squared_error if self.task.code is not None and source == "code" else None
        error = squared_error(self._original, written.adapter)
        return error if math.isfinite(error) else None  # an original of zeros has no relative error

    def _completed(self, known: SourceResult, references: Mapping[Source, SourceResult]) -> SourceResult:
        """Add the retained gain to a result that was measured while the original was evicted."""
        gain = self.result_of(known.source, known.score, known.squared_error, references).retained_gain
        if known.retained_gain is not None or gain is None:
            return known
        result = replace(known, retained_gain=gain)
        self.made.append(self.record_of(result))
        return result

    def _recorded(self, source: Source) -> SourceResult | None:
        """Return an earlier result of a source on the same text, with the same settings and generator."""
        for one in self.task.measured:
            is_same_text = (one.source, one.data, dict(one.settings)) == (source, self._text.digest, self._settings)
            if is_same_text and one.generator == self._generator_of(source):
                return SourceResult(source, MetricResult.of(one), one.retained_gain, one.squared_error)
        return None

    @cached_property
    def _recognized(self) -> Code | None:
        known = self._models.exemplars(self.task.base_model).recognized(self.task)
        return None if known is None else known.code

    def _code_of(self, source: Source) -> Code | None:
        """Return the code that a source decodes; None if the network predicts it."""
        return self.task.code if source == "code" else self._recognized if source == "recalled" else None

    def _generator_of(self, source: Source) -> str | None:
        """Return the digest of the network that a source depends on."""
        if source in ("base", "original"):
            return None
        if source == "code" and self._generator is not None:
            return str(self._generator)
        code = self._code_of(source)
        return self._current if code is None else str(code.generator)
