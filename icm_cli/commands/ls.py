"""`icm ls`: list the tasks in the store, or in a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.options import BaseModelOpt, FromOpt
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import coded_size
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.fleet.records import TaskSummary

_COLUMNS = (
    Column("task", shrink=True),
    Column("base model", shrink=True),
    Column("rank", right=True),
    Column("targets", shrink=True),
    Column("original", right=True),
    Column("checkpoints", right=True),
    Column("vectors", right=True),
    Column("code", right=True),
)


@command
def ls(session: Session, base_model: BaseModelOpt = None, bundle: FromOpt = None) -> None:
    """List the tasks in the store, or in a bundle with --from.

    ORIGINAL is the size of the original, "evicted" if its weights were deleted, or "pinned" if they never will be.
    CODE is the size of the code under the current generator, plus its residual if it has one; "-" means no code yet
    (run `icm train`), "original only" that there can be none (`icm show` says why). --quiet prints one name per line.

    Example:
      icm ls --json
    """
    if bundle is not None:
        from icm_cli.commands.bundle_list import list_bundle

        list_bundle(session, bundle, base_model)
        return
    rows = session.fleet.tasks(base_model)
    out = session.out
    out.document([_as_json(row) for row in rows])
    if out.is_quiet:
        for row in rows:
            out.answer(row.task.name)
    out.table(_COLUMNS, [_as_cells(row) for row in rows])
    if not rows:
        out.note("no tasks")
        out.hint("run `icm ingest PATH` to add adapters")


def _as_cells(row: TaskSummary) -> list[str]:
    return [
        row.task.name,
        row.task.base_model,
        str(row.final.rank_max),
        ",".join(row.final.target_modules),
        _original(row),
        str(row.checkpoints),
        str(row.vectors),
        _coded(row),
    ]


def _coded(row: TaskSummary) -> str:
    if row.final.original_only is not None:
        return "original only"
    if row.code is None:
        return "-"
    return coded_size(row.code.size, None if row.code.residual is None else row.code.residual.size)


def _original(row: TaskSummary) -> str:
    if row.final.is_evicted:
        return "evicted"
    size = human_size(row.final.original_bytes)
    return f"pinned {size}" if row.task.pinned else size


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
        "checkpoints_count": row.checkpoints,
        "evicted_checkpoints_count": row.evicted_checkpoints,
        "vectors_count": row.vectors,
        "code_size": None if row.code is None else row.code.size,
        "residual_size": None if row.code is None or row.code.residual is None else row.code.residual.size,
        "dw_error": None if row.code is None else row.code.best_error,
        "created_at": row.task.created_at,
    }
