"""`icm ls`: list the tasks in the store, or in a bundle."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from icm_cli.errors import UsageProblem
from icm_cli.options import BaseModelOpt, FiltersOpt, FromOpt, LimitOpt, SortOpt, option
from icm_cli.output import Column, Field
from icm_cli.session import Session, command
from icm_cli.text import claim_json, claim_text, coded_size, errors_json
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import counted, human_size, in_ranges

if TYPE_CHECKING:
    from icmlora.fleet.records import TaskSummary

TagsOpt = Annotated[bool, option("--tags", "List all tags with their number of tasks instead.")]
OldFiltersOpt = Annotated[list[str] | None, option("-f", "As --filter.", hidden=True)]


@command
def ls(
    session: Session,
    base_model: BaseModelOpt = None,
    filters: FiltersOpt = None,
    sort: SortOpt = None,
    limit: LimitOpt = None,
    bundle: FromOpt = None,
    tags: TagsOpt = False,
    old_filters: OldFiltersOpt = None,
) -> None:
    """List the tasks in the store, or in a bundle with --from.

    ORIGINAL: size of the original; "evicted" if it was deleted, "none" if a bundle brought only the code.
    CODE: size of the code; "-" if there is none yet (run `icm train`), "original only" if there cannot be one
    (`icm show` gives the reason). GAIN and RELATIVE ERROR: measured quality of the code. A narrow terminal shows fewer
    columns. --quiet prints only names.

    A filter is FIELD, an operator (= != > >= < <= or ~ for contains) and a value; case does not matter. Fields: name,
    base, rank, size, code, extras, gain, error, tag, source, note, and status (evicted, pinned, coded, original-only,
    does-nothing, generated). Sizes take units: 10MB, 512KiB.

    Example:
      icm ls -F 'rank>=8' -F tag=prod -F 'base~llama' --sort size:desc --limit 20
    """
    from icmlora.fleet.tasks.tasks import count_tasks, list_names, list_tasks

    if tags:
        list_tags(session)
        return
    if old_filters:
        session.out.note("`icm ls -f` is deprecated and will be removed: use -F or --filter")
        filters = [*(filters or ()), *old_filters]
    if bundle is not None:
        from icm_cli.bundle_list import list_bundle

        if filters or sort is not None or limit is not None:
            raise UsageProblem(
                "--from excludes --filter, --sort and --limit", hint="list the whole bundle, or import it first"
            )
        list_bundle(session, bundle, base_model)
        return
    out, context, chosen = session.out, session.context, tuple(filters or ())
    if out.is_quiet:
        out.names(list_names(context, base_model, filters=chosen, sort=sort, limit=limit))
        return
    rows = list_tasks(context, base_model, filters=chosen, sort=sort, limit=limit)
    if out.is_json:  # fields for thousands of tasks take longer than to read them
        out.document([_as_json(row) for row in rows])
    out.listing(_FIELDS, rows)
    if len(rows) == limit and (more := count_tasks(context, base_model, filters=chosen) - len(rows)) > 0:
        out.note(f"{counted(more, 'more task')} not shown")
    if not rows and filters:
        out.note("no task matches the filters")
    elif not rows:
        out.note("the store has no tasks")
        out.hint("run `icm ingest PATH` to add adapters")


def list_tags(session: Session) -> None:
    """Print all tags with their number of tasks."""
    from icmlora.fleet.tasks import tasks

    out, tags = session.out, tasks.list_tags(session.context)
    out.document([{"tag": tag, "tasks_count": number} for tag, number in tags.items()])
    out.names(tags)
    out.table((Column("tag"), Column("tasks", right=True)), [[tag, str(number)] for tag, number in tags.items()])
    if not tags:
        out.note("no task has a tag")


@lru_cache(maxsize=256)  # most tasks share their targets
def _targets(modules: tuple[str, ...]) -> str:
    return ",".join(in_ranges(modules))


def _coded(row: TaskSummary) -> str:
    if row.final.original_only is not None:
        return "original only"
    return coded_size(None if row.code is None else row.code.size)


def _original(row: TaskSummary) -> str:
    if row.final.was_never_here:
        return "none"
    if row.final.is_evicted:
        return "evicted"
    size = human_size(row.final.original_bytes)
    return f"pinned {size}" if row.task.pinned else size


def _error(row: TaskSummary) -> str:
    squared = None if row.code is None else row.code.squared_error
    return "" if squared is None else f"{math.sqrt(squared):.3f}"


def _claimed(row: TaskSummary) -> str:
    return "" if row.code is None or row.code.claim is None else claim_text(row.code.claim)


def _extras(row: TaskSummary) -> str:
    return human_size(row.final.extras_bytes) if row.final.extras else ""


_FIELDS: tuple[Field[TaskSummary], ...] = (
    Field("task", lambda row: row.task.name, shrink=True),
    Field("base model", lambda row: row.task.base_model, shrink=True),
    Field("rank", lambda row: str(row.final.rank_max), right=True),
    Field("targets", lambda row: _targets(tuple(row.final.target_modules)), shrink=True, spare=3),
    Field("original", _original, right=True),
    Field("checkpoints", lambda row: str(row.checkpoints), right=True, spare=6),
    Field("vectors", lambda row: str(row.vectors), right=True, spare=5),
    Field("code", _coded, right=True),
    Field("gain", lambda row: gain_text(row.gain, row.gain_precision, missing=""), right=True, spare=7, is_rare=True),
    Field("relative error", _error, right=True, spare=8, is_rare=True),
    Field("claimed by the bundle", _claimed, shrink=True, spare=1, is_rare=True),
    Field("extras", _extras, right=True, spare=4, is_rare=True),
    Field("tags", lambda row: " ".join(row.task.tags), shrink=True, spare=2, is_rare=True),
)


def _as_json(row: TaskSummary) -> dict[str, object]:
    return {
        "name": row.task.name,
        "base_model": row.task.base_model,
        "rank": row.final.rank_max,
        "dtype": row.final.dtype.lower(),
        "parameters": row.final.parameters,
        "target_modules": list(row.final.target_modules),
        "original_size": row.final.original_bytes,
        "evicted_at": row.final.evicted_at,
        "pinned": row.task.pinned,
        "original_only": row.final.original_only,
        "extras_bytes": row.final.extras_bytes,
        "tags": list(row.task.tags),
        "note": row.task.note,
        "checkpoints_count": row.checkpoints,
        "evicted_checkpoints_count": row.evicted_checkpoints,
        "vectors_count": row.vectors,
        "code_size": None if row.code is None else row.code.size,
        "retained_gain": row.gain,
        "precision": row.gain_precision,
        **errors_json(None if row.code is None else row.code.squared_error),
        "effect": None if row.code is None else row.code.effect,
        "keep": None if row.code is None or row.code.asked is None else row.code.asked.keep,
        "claimed": None if row.code is None else claim_json(row.code.claim),
        "created_at": row.task.created_at,
    }
