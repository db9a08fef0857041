"""`icm ls --from FILE`: the tasks in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.output import Column
from icm_cli.session import Session
from icm_cli.text import errors_json
from icmlora.fleet.measure.precision import gain_text
from icmlora.io.text import human_size, in_ranges

if TYPE_CHECKING:
    from icmlora.bundle.index import BundledTask
    from icmlora.fleet.bundles.bundles import Bundle

_COLUMNS = (
    Column("task", shrink=True),
    Column("base model", shrink=True),
    Column("rank", right=True),
    Column("targets", shrink=True),
    Column("original", right=True),
    Column("code", right=True),
    Column("claimed error", right=True),
    Column("claimed gain", right=True),
)


def list_bundle(session: Session, file: Path, base_model: str | None) -> None:
    """Print what a bundle holds; only its index is read."""
    from icmlora.fleet.bundles.bundles import Bundle
    from icmlora.fleet.context import check_base_model

    out, bundle = session.out, Bundle(file)
    check_base_model(base_model, (bundle.base_model,))
    out.document([_as_json(bundle, task) for task in bundle.tasks])
    if out.is_quiet:
        for task in bundle.tasks:
            out.answer(task.name)
    out.table(_COLUMNS, [_as_cells(bundle, task) for task in bundle.tasks])
    out.note(f"generator {bundle.generator.version} of {bundle.base_model}; bundle {bundle.digest}")


def _as_cells(bundle: Bundle, task: BundledTask) -> list[str]:
    error = errors_json(task.squared_error)["relative_error"]
    return [
        task.name,
        bundle.base_model,
        str(task.rank_max),
        ",".join(in_ranges(task.target_modules)),
        human_size(bundle.original_size(task)),
        human_size(bundle.code_size(task)),
        "-" if error is None else f"{error:.4f}",
        gain_text(task.retained_gain, task.precision),
    ]


def _as_json(bundle: Bundle, task: BundledTask) -> dict[str, object]:
    return {
        "name": task.name,
        "base_model": bundle.base_model,
        "rank": task.rank_max,
        "dtype": task.dtype.lower(),
        "parameters": task.parameters,
        "target_modules": list(task.target_modules),
        "original_size": bundle.original_size(task),
        "code_size": bundle.code_size(task),
        **errors_json(task.squared_error),
        "retained_gain": task.retained_gain,
        "precision": task.precision,
    }
