"""Encode again for limits or refine, and measure, after a training or an update.

    new codes ─┬─ limits ──▶ encode ─────────────────┬──▶ evaluate, where possible
               └─ none ────▶ refine, where possible ─┘

The store is complete before and after each of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from icmlora.errors import Cancelled
from icmlora.fleet.context import Context, StageBegun
from icmlora.fleet.encode.encode import EncodeReport, encode_in
from icmlora.fleet.failures import BaseModelFailed
from icmlora.fleet.measure.evaluate import EvaluateReport, Measurable, evaluate_in, measurable_in
from icmlora.generator.codec.limits import Limits
from registry.errors import IcmError

if TYPE_CHECKING:
    from registry.store import Store


@dataclass
class FinishReport:
    """The results of encoding and measuring after a training."""

    failed: list[BaseModelFailed] = field(default_factory=list)
    encoded: list[EncodeReport] = field(default_factory=list)  # once for limits, or for each base model refined
    measurable: Measurable | None = None  # tasks that this machine can measure; None before that is known
    evaluated: EvaluateReport | None = None
    evaluate_error: IcmError | None = None  # why none of the measurable tasks could be measured

    @property
    def is_partial(self) -> bool:
        """Whether a base model failed, a code misses a limit, or a task could not be measured."""
        short = any(one.short for one in self.encoded)
        unmeasured = self.evaluated is not None and self.evaluated.is_partial
        return bool(self.failed) or short or unmeasured or self.evaluate_error is not None


def finish(
    context: Context,
    store: Store,
    report: FinishReport,
    base_models: Sequence[str],
    tasks: Sequence[str],
    limits: Limits,
    *,
    only: str | None,
    measure: bool,
    device: str,
    workers: str | None,
) -> None:
    """Encode again for limits or refine, then measure, and add the results to the report.

    `base_models` are those with new codes, `tasks` the tasks with a new code, if not all, and `only` the base model
    that was selected, if any. Without limits, codes are refined.
    """
    labels: Sequence[str | None] = base_models if limits.refine != 0 else []
    if not limits.is_by_quality:
        labels = [only] if base_models else []
    for label in labels:
        try:
            context.on_event(StageBegun("encode", report))
            encoded = encode_in(context, store, tasks, limits, label, device, workers)
            report.encoded.append(encoded)
        except Cancelled as stop:
            report.encoded.append(cast("EncodeReport | None", stop.report) or EncodeReport())
            raise
    if not (measure and base_models):
        return
    report.measurable = measurable_in(store, base_models, tasks)
    if (names := report.measurable.tasks) == []:
        return
    try:
        context.on_event(StageBegun("eval", report))
        report.evaluated = evaluate_in(context, store, names, sources=("code",), device=device, workers=workers)
    except Cancelled as stop:
        report.evaluated = cast("EvaluateReport | None", stop.report) or EvaluateReport()
        raise
    except IcmError as error:  # the codes are made
        report.evaluate_error = error
