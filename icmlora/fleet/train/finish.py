"""Encode again for limits or refine, and measure, after a training or an update.

    new codes ─┬─ limits ──▶ encode ─────────────────┬──▶ evaluate, where possible
               └─ none ────▶ refine, where possible ─┘

The store is complete before and after each of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from icmlora.errors import Cancelled
from icmlora.fleet.context import Context, StageBegun
from icmlora.fleet.encode.report import EncodeReport
from icmlora.fleet.encode.tasks import encode_in
from icmlora.fleet.measure.report import EvaluateReport
from icmlora.fleet.measure.tasks import evaluate_in, measurable_in
from icmlora.fleet.train.report import TrainReport, Updated
from icmlora.generator.codec.limits import Limits
from registry.errors import IcmError

if TYPE_CHECKING:
    from registry.store import Store


def finish(
    context: Context,
    store: Store,
    report: TrainReport,
    tasks: Sequence[str],
    limits: Limits,
    *,
    only: str | None,
    measure: bool,
    device: str,
    workers: str | None,
) -> None:
    """Encode again for limits or refine, then measure, and add the results to the report.

    `tasks` are those with a new code, if not all, and `only` is the base model that was selected, if any. Without
    limits, codes are refined.
    """
    base_models = [one.base_model for one in report.done if not isinstance(one, Updated) or one.tasks]
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
        report.evaluated = evaluate_in(context, store, names, ("code",), device, workers)
    except Cancelled as stop:
        report.evaluated = cast("EvaluateReport | None", stop.report) or EvaluateReport()
        raise
    except IcmError as error:  # the codes are made
        report.evaluate_error = error
