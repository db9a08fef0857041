"""`icm ls`: list the tasks in the store, or in a bundle."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from icm_cli.bundle_list import list_bundle
from icm_cli.command import Call, command
from icm_cli.errors import UsageProblem
from icm_cli.output import Column, Field
from icm_cli.session import Session
from icm_cli.text import claim_json, claim_text, coded_size, errors_json
from icmlora.fleet.measure.metric_result import gain_text, relative_error
from icmlora.fleet.params import BundleFile, Param
from icmlora.fleet.rows import claim_of, limits_of, was_never_here
from icmlora.fleet.tasks.listing import count_tasks, list_tags, list_tasks
from icmlora.io.text import counted, human_size, in_ranges

if TYPE_CHECKING:
    from registry.tables import TaskRow

TagsOpt = Annotated[bool, Param("List all tags with their number of tasks instead.", "--tags")]


@command(list_tasks)
def ls(session: Session, call: Call[list[TaskRow]], bundle: BundleFile = None, tags: TagsOpt = False) -> None:
    filters, limit = call["filters"], call["limit"]
    if tags:
        _list_tags(session)
        return
    if bundle is not None:
        if filters or call["sort"] is not None or limit is not None:
            raise UsageProblem(
                "--from excludes --filter, --sort and --limit", hint="list the whole bundle, or import it first"
            )
        list_bundle(session, bundle, call["base_model"])
        return
    out, rows = session.out, call.now()
    out.names(row.name for row in rows)
    if out.is_json:  # fields for thousands of tasks take longer than to read them
        out.document([_as_json(row) for row in rows])
    out.listing(_FIELDS, rows)
    if len(rows) == limit:
        more = count_tasks(session.context, call["base_model"], filters=filters) - len(rows)
        if more > 0:
            out.note(f"{counted(more, 'more task')} not shown")
    if not rows and filters:
        out.note("no task matches the filters")
    elif not rows:
        out.note("the store has no tasks")
        out.hint("run `icm ingest PATH` to add adapters")


def _list_tags(session: Session) -> None:
    """Print all tags with their number of tasks."""
    out, tags = session.out, list_tags(session.context)
    out.document([{"tag": tag, "tasks_count": number} for tag, number in tags.items()])
    out.names(tags)
    out.table((Column("tag"), Column("tasks", right=True)), [[tag, str(number)] for tag, number in tags.items()])
    if not tags:
        out.note("no task has a tag")


@lru_cache(maxsize=256)  # most tasks share their targets
def _targets(modules: str) -> str:
    return ",".join(in_ranges(modules.split()))


def _coded(row: TaskRow) -> str:
    return "original only" if row.original_only is not None else coded_size(row.code_size)


def _original(row: TaskRow) -> str:
    if row.evicted_at is not None:
        return "none" if was_never_here(row) else "evicted"
    size = human_size(row.original_bytes)
    return f"pinned {size}" if row.pinned else size


def _error(row: TaskRow) -> str:
    error = relative_error(row.squared_error)
    return "" if error is None else f"{error:.3f}"


def _extras(row: TaskRow) -> str:
    return human_size(row.extras_bytes) if row.extras_bytes else ""


def _claimed(row: TaskRow) -> str:
    claim = claim_of(row)
    return "" if claim is None else claim_text(claim)


_FIELDS: tuple[Field[TaskRow], ...] = (
    Field("task", lambda row: row.name, shrink=True),
    Field("version", lambda row: str(row.version) if row.version > 1 else "", right=True, spare=9, is_rare=True),
    Field("base model", lambda row: row.base, shrink=True),
    Field("rank", lambda row: str(row.rank), right=True),
    Field("targets", lambda row: _targets(row.targets), shrink=True, spare=3),
    Field("original", _original, right=True),
    Field("checkpoints", lambda row: str(row.checkpoints), right=True, spare=6),
    Field("vectors", lambda row: str(row.vectors), right=True, spare=5),
    Field("code", _coded, right=True),
    Field("gain", lambda row: gain_text(row.gain, row.gain_precision, missing=""), right=True, spare=7, is_rare=True),
    Field("relative error", _error, right=True, spare=8, is_rare=True),
    Field("claimed by the bundle", _claimed, shrink=True, spare=1, is_rare=True),
    Field(
        "extras",
        lambda row: human_size(row.extras_bytes) if row.extras_bytes else "",
        right=True,
        spare=4,
        is_rare=True,
    ),
    Field("tags", lambda row: row.tags.strip(), shrink=True, spare=2, is_rare=True),
)


def _as_json(row: TaskRow) -> dict[str, object]:
    limits = limits_of(row)
    return {
        "name": row.name,
        "version": row.version,
        "base_model": row.base,
        "rank": row.rank,
        "dtype": row.dtype.lower(),
        "parameters": row.parameters,
        "target_modules": row.targets.split(),
        "original_size": row.original_bytes,
        "evicted_at": row.evicted_at,
        "pinned": row.pinned,
        "original_only": row.original_only,
        "extras_bytes": row.extras_bytes,
        "tags": row.tags.split(),
        "note": row.note,
        "checkpoints_count": row.checkpoints,
        "evicted_checkpoints_count": row.evicted_checkpoints,
        "vectors_count": row.vectors,
        "code_size": row.code_size,
        "retained_gain": row.gain,
        "precision": row.gain_precision,
        **errors_json(row.squared_error),
        "effect": row.effect,
        "keep": None if limits is None else limits.keep,
        "claimed": claim_json(claim_of(row)),
        "created_at": row.created_at,
    }
