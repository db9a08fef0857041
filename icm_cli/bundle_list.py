"""`icm ls --from FILE`: the tasks in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import claim_json, figure
from icmlora.fleet.context import check_base_model
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import human_size, in_ranges

if TYPE_CHECKING:
    from registry.manifests import Task

_NO_CLAIM = dict.fromkeys(("relative_error", "squared_error", "retained_gain", "precision"))
_FIELDS: tuple[Field[dict[str, Any]], ...] = (
    Field("task", lambda row: row["name"], shrink=True),
    Field("base model", lambda row: row["base_model"], shrink=True),
    Field("rank", lambda row: str(row["rank"]), right=True),
    Field("targets", lambda row: ",".join(in_ranges(row["target_modules"])), shrink=True),
    Field("original", lambda row: human_size(row["original_size"]), right=True),
    Field("code", lambda row: human_size(row["code_size"]), right=True),
    Field("claimed error", lambda row: figure(row["relative_error"]), right=True),
    Field("claimed gain", lambda row: gain_text(row["retained_gain"], row["precision"]), right=True),
)


def list_bundle(session: Session, file: Path, base_model: str | None) -> None:
    """Print the tasks of a bundle. Reads only its index."""
    from icmlora.fleet.bundles.bundles import Bundle

    out, bundle = session.out, Bundle(file)
    check_base_model(base_model, (bundle.base_model,))
    rows = [_row(bundle.base_model, task) for task in bundle.tasks]
    out.document(rows)
    out.names(task.name for task in bundle.tasks)
    out.listing(_FIELDS, rows)
    out.note(f"generator {bundle.generator.version} of {bundle.base_model}; bundle {bundle.digest}")


def _row(base_model: str, task: Task) -> dict[str, Any]:
    final, code = task.final, task.code
    return {
        "name": task.name,
        "base_model": base_model,
        "rank": final.rank_max,
        "dtype": final.dtype.lower(),
        "parameters": final.parameters,
        "target_modules": list(final.target_modules),
        "original_size": final.original_bytes,
        "code_size": 0 if code is None else code.size,
        **(claim_json(None if code is None else code.claim) or _NO_CLAIM),
    }
