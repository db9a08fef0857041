"""`icm ls --from FILE`: the tasks in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.output import Column
from icm_cli.session import Session
from icmlora.io.text import human_size

if TYPE_CHECKING:
    from icmlora.bundle.index import BundledTask, BundleIndex

_COLUMNS = (
    Column("task", shrink=True),
    Column("base model", shrink=True),
    Column("rank", right=True),
    Column("targets", shrink=True),
    Column("original", right=True),
    Column("code", right=True),
    Column("dW error", right=True),
    Column("gain", right=True),
)


def list_bundle(session: Session, bundle: Path, base_model: str | None) -> None:
    """Print what a bundle holds; only its index is read."""
    from icmlora.fleet.bundles import read_index
    from icmlora.fleet.context import check_base_model

    out = session.out
    index, digest = read_index(bundle)
    check_base_model(base_model, (index.base_model,))
    out.document([_as_json(index, task) for task in index.tasks])
    if out.is_quiet:
        for task in index.tasks:
            out.answer(task.name)
    out.table(_COLUMNS, [_as_cells(index, task) for task in index.tasks])
    out.note(f"generator {index.generator.version} of {index.base_model}; bundle {digest}")


def _original_size(index: BundleIndex, task: BundledTask) -> int:
    return task.weights_size + index.sizes[task.config] + (0 if task.card is None else index.sizes[task.card])


def _as_cells(index: BundleIndex, task: BundledTask) -> list[str]:
    return [
        task.name,
        index.base_model,
        str(task.rank_max),
        ",".join(task.target_modules),
        human_size(_original_size(index, task)),
        human_size(index.sizes[task.code]),
        "-" if task.dw_error is None else f"{task.dw_error:.4f}",
        "-" if task.retained_gain is None else f"{task.retained_gain:.3f}",
    ]


def _as_json(index: BundleIndex, task: BundledTask) -> dict[str, object]:
    return {
        "name": task.name,
        "base_model": index.base_model,
        "rank": task.rank_max,
        "dtype": task.dtype.lower(),
        "parameters": task.parameters,
        "target_modules": list(task.target_modules),
        "original_size": _original_size(index, task),
        "code_size": index.sizes[task.code],
        "dw_error": task.dw_error,
        "retained_gain": task.retained_gain,
    }
