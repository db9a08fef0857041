"""What comes after a training or an update: codes for limits, or refined codes, and what they keep.

    new codes ─┬─ limits ──▶ encode ─────────────────┬──▶ evaluate, where possible
               └─ none ────▶ refine, where possible ─┘

The store is complete before and after each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from icmlora.errors import Cancelled
from icmlora.fleet.context import Context, StageBegun
from icmlora.fleet.encode.encode import EncodeReport, encode
from icmlora.fleet.failures import BaseModelFailed
from icmlora.fleet.measure.evaluate import EvaluateReport, Measurable, evaluate, measurable
from registry.errors import IcmError

R = TypeVar("R", EncodeReport, EvaluateReport)


@dataclass
class FinishReport:
    """What was done with new codes."""

    failed: list[BaseModelFailed] = field(default_factory=list)
    encoded: list[EncodeReport] = field(default_factory=list)  # once for limits, or for each base model refined
    measurable: Measurable | None = None  # what this machine can measure, once that was looked at
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
    report: FinishReport,
    base_models: Sequence[str],
    tasks: Sequence[str] = (),
    *,
    base_model: str | None,
    quality: int | None,
    tolerance: float | None,
    refine: int | None,
    min_gain: float | None,
    max_error: float | None,
    measure: bool,
    device: str,
    workers: str | None,
) -> None:
    """Encode again for limits or refine, then measure, and note in the report what was done.

    Args:
        context: The store, and who listens.
        report: What to complete.
        base_models: Base models of which tasks have new codes.
        tasks: These tasks, if not all.
        base_model: The only base model that is meant.
        quality: Of refined codes; by default that of the generator.
        tolerance: Of the new codes. Codes of a tolerance of their own are not refined.
        refine: Steps of refinement where there are no limits; 0 for none.
        min_gain: A limit, as in `encode`.
        max_error: A limit, as in `encode`.
        measure: Whether to measure the codes.
        device: Where to compute.
        workers: Where to compute, as described for `Fleet`.
    """
    if not base_models:
        return
    if max_error is not None or min_gain is not None:

        def for_limits() -> EncodeReport:
            return encode(
                context,
                tasks,
                min_gain=min_gain,
                max_error=max_error,
                base_model=base_model,
                device=device,
                workers=workers,
            )

        _stage(context, report, "encode", for_limits, EncodeReport(), report.encoded.append)
    elif tolerance is None and refine != 0:
        for label in base_models:

            def refined(label: str = label) -> EncodeReport:
                return encode(
                    context, tasks, quality=quality, refine=refine, base_model=label, device=device, workers=workers
                )

            _stage(context, report, "encode", refined, EncodeReport(), report.encoded.append)
    if measure:
        _measure(context, report, base_models, tasks, device, workers)


def _measure(
    context: Context,
    report: FinishReport,
    base_models: Sequence[str],
    tasks: Sequence[str],
    device: str,
    workers: str | None,
) -> None:
    """Measure the codes that this machine can measure; an error is only noted, because the codes are made."""
    report.measurable = found = measurable(context, base_models, tasks)
    if not found.tasks:
        return

    def note(evaluated: EvaluateReport) -> None:
        report.evaluated = evaluated

    try:
        _stage(
            context,
            report,
            "eval",
            lambda: evaluate(context, found.tasks, sources=("code",), device=device, workers=workers),
            EvaluateReport(),
            note,
        )
    except Cancelled:
        raise
    except IcmError as error:
        report.evaluate_error = error


def _stage(
    context: Context, report: FinishReport, label: str, work: Callable[[], R], nothing: R, note: Callable[[R], None]
) -> None:
    """Do one thing after the other, and note its report even if it was stopped."""
    try:
        context.on_event(StageBegun(label, report))
        note(work())
    except Cancelled as stop:
        note(nothing if stop.report is None else cast(R, stop.report))
        raise
