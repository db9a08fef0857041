"""`icm stats`: show the bytes on disk, the saving, and the quality lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from icm_cli.command import Call, command
from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import as_fields, coded_size, errors_json, figure
from icmlora.fleet.measure.metric_result import gain_text, measured_in
from icmlora.fleet.stats import stats as use_case
from icmlora.fleet.stats.bill_text import claims_text, disk_lines, saving_text, shortfalls
from icmlora.io.text import counted, human_percent, human_size

if TYPE_CHECKING:
    from icmlora.fleet.stats.bill import BaseModelBill, Bill, Spread, TaskBill

R = TypeVar("R")

_FLEET_FIELDS: tuple[Field[BaseModelBill], ...] = (
    Field("base model", lambda fleet: fleet.base_model, shrink=True),
    Field("tasks", lambda fleet: str(len(fleet.tasks)), right=True),
    Field("bf16", lambda fleet: human_size(fleet.bf16_size), right=True),
    Field("generator", lambda fleet: human_size(fleet.shared_size) if fleet.generator else "-", right=True),
    Field("codes+vectors", lambda fleet: human_size(fleet.codes_and_vectors_size), right=True),
    Field("extras", lambda fleet: human_size(fleet.extras_bytes), right=True),
    Field("per task", lambda fleet: _size(fleet.marginal_size), right=True),
    Field("of bf16", lambda fleet: _fleet_share(fleet), right=True),
    Field("break-even", lambda fleet: _break_even(fleet), right=True),
    Field("relative error", lambda fleet: _mean_and_worst(fleet.relative_errors, fleet), right=True),
    Field("retained gain", lambda fleet: _mean_and_worst(fleet.retained_gains, fleet), right=True),
)
_TASK_FIELDS: tuple[Field[TaskBill], ...] = (
    Field("task", lambda task: task.row.name, shrink=True),
    Field("bf16", lambda task: human_size(task.bf16_size), right=True),
    Field("original", lambda task: "evicted" if task.row.evicted_at else human_size(task.row.stored_bytes), right=True),
    Field("code", lambda task: _code(task), right=True),
    Field("vectors", lambda task: human_size(task.row.vectors_bytes), right=True),
    Field("extras", lambda task: human_size(task.row.extras_bytes), right=True),
    Field("of bf16", lambda task: _task_share(task), right=True),
    Field("relative error", lambda task: figure(task.relative_error, 3), right=True),
    Field("retained gain", lambda task: gain_text(task.row.gain, task.row.gain_precision), right=True),
)


@command(use_case.stats)
def stats(session: Session, call: Call[Bill]) -> None:
    found = call.now()
    out = session.out
    if out.is_json:  # a line per task takes longer than all the rest
        out.document(_as_json(found))
    out.listing(_fields(_FLEET_FIELDS, found), found.fleets)
    if out.verbosity:
        out.line()
        out.listing(_fields(_TASK_FIELDS, found), found.each)
    if found.fleets:
        out.line()
    usage = found.usage
    lines = [*disk_lines(usage), ("reserve and lock files", usage.overhead), ("on disk", usage.total)]
    always = {"originals (final adapters)", "on disk"}
    shown = [(name, human_size(size)) for name, size in lines if size or name in always]
    gone = [("originals evicted", f"{found.evicted} of {found.tasks}")] if found.evicted else []
    out.record([*shown[:1], *gone, *shown[1:]])
    out.line()
    out.line(_verdict(found))
    for line in shortfalls(found.missed_limits):
        out.line(line)
    if (claims := claims_text(found)) is not None:
        out.line(claims)
    if call["plot"] is not None:
        out.note(f"drew {call['plot']}")


def _fields(fields: Sequence[Field[R]], found: Bill) -> list[Field[R]]:
    """Return the columns of a table, without the one for extras if there are none."""
    return [field for field in fields if field.title != "extras" or found.usage.extras]


def _verdict(found: Bill) -> str:
    if not found.bf16_size:
        return "the store has no tasks"
    now = found.usage.total / found.bf16_size
    disk = (
        f"The store takes {human_percent(now)} of the size of all final adapters in bf16 "
        f"({human_size(found.bf16_size)})"
    )
    return f"{disk}{_originals(found)}. {saving_text(found)}"


def _originals(found: Bill) -> str:
    """Return how many originals are still in the store."""
    left = found.tasks - found.evicted
    if not found.evicted:
        return " because it still holds the originals"
    return f" with the originals of {left} of {counted(found.tasks, 'task')}" if left else "; every original is evicted"


def _size(size: float | None) -> str:
    return "-" if size is None else human_size(round(size))


def _code(task: TaskBill) -> str:
    return "original only" if task.row.original_only else coded_size(task.row.code_size)


def _task_share(task: TaskBill) -> str:
    has_size = task.row.is_coded or task.row.original_only is not None
    return human_percent(task.size / task.bf16_size if has_size and task.bf16_size else None)


def _fleet_share(fleet: BaseModelBill) -> str:
    size = fleet.shared_size + fleet.per_task_size
    return human_percent(size / fleet.bf16_size if fleet.is_complete and fleet.bf16_size else None)


def _break_even(fleet: BaseModelBill) -> str:
    if not fleet.encoded:
        return "-"
    return "never" if fleet.break_even is None else str(fleet.break_even)


def _mean_and_worst(found: Spread | None, fleet: BaseModelBill) -> str:
    if found is None:
        return "not measured"
    missing = "" if found.tasks == len(fleet.tasks) else f" ({counted(found.tasks, 'task')})"
    return f"{found.mean:.3f} / {found.worst:.3f}{measured_in(found.precisions)}{missing}"


def _as_json(found: Bill) -> dict[str, object]:
    share = found.compact_share
    return {
        "on_disk": vars(found.usage) | {"total": found.usage.total},
        "original_size": found.bf16_size,
        "stored_size": found.usage.total,
        "compact_size": found.compact_size,
        "compression_ratio": None if share is None else 1 / share,
        "space_saving": None if share is None else 1 - share,
        "complete": found.is_complete,
        "evicted_count": found.evicted,
        "original_only_count": found.original_only,
        "fleets": [_fleet_json(fleet) for fleet in found.fleets],
    }


def _fleet_json(fleet: BaseModelBill) -> dict[str, object]:
    return {
        "base_model": fleet.base_model,
        "adapters_count": len(fleet.tasks),
        "encoded_count": len(fleet.encoded),
        "evicted_count": fleet.evicted,
        "original_size": fleet.bf16_size,
        "generator": None if fleet.generator is None else fleet.generator.blob,
        "generator_version": None if fleet.generator is None else fleet.generator.version,
        "decoder_size": fleet.generator_size,
        "start_size": fleet.start_size,
        "short_count": len(fleet.missed_limits),
        "codes_and_vectors_size": fleet.codes_and_vectors_size,
        "original_only_count": fleet.original_only,
        "extras_bytes": fleet.extras_bytes,
        "marginal_size": fleet.marginal_size,
        "break_even_count": fleet.break_even,
        "tasks": [_task_json(task) for task in fleet.tasks],
    }


def _task_json(task: TaskBill) -> dict[str, object]:
    row = task.row
    return {
        "task": row.name,
        "bf16_size": task.bf16_size,
        "original_size": row.stored_bytes,
        "evicted": row.evicted_at is not None,
        "vectors_size": row.vectors_bytes,
        "code_size": row.code_size,
        **errors_json(row.squared_error),
        "retained_gain": row.gain,
        "precision": row.gain_precision,
        "effect": row.effect,
        "asked": None if task.limits is None else as_fields(task.limits, "more"),
        "original_only": row.original_only,
        "extras_bytes": row.extras_bytes,
        "is_claimed": row.claim is not None,
    }
