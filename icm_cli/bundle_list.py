"""`icm ls --from FILE`: the tasks in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import errors_json, figure
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.io.text import human_size, in_ranges

if TYPE_CHECKING:
    from icmlora.bundle.index import BundledTask
    from icmlora.fleet.bundles.bundles import Bundle


def list_bundle(session: Session, file: Path, base_model: str | None) -> None:
    """Print the tasks of a bundle. Reads only its index."""
    from icmlora.fleet.bundles.bundles import Bundle
    from icmlora.fleet.context import check_base_model

    out, bundle = session.out, Bundle(file)
    check_base_model(base_model, (bundle.base_model,))
    out.document([_as_json(bundle, task) for task in bundle.tasks])
    out.names(task.name for task in bundle.tasks)
    out.listing(_fields(bundle), bundle.tasks)
    out.note(f"generator {bundle.generator.version} of {bundle.base_model}; bundle {bundle.digest}")


def _fields(bundle: Bundle) -> list[Field[BundledTask]]:
    return [
        Field("task", lambda task: task.name, shrink=True),
        Field("base model", lambda task: bundle.base_model, shrink=True),
        Field("rank", lambda task: str(task.rank_max), right=True),
        Field("targets", lambda task: ",".join(in_ranges(task.target_modules)), shrink=True),
        Field("original", lambda task: human_size(bundle.original_size(task)), right=True),
        Field("code", lambda task: human_size(bundle.code_size(task)), right=True),
        Field("claimed error", lambda task: figure(errors_json(task.squared_error)["relative_error"]), right=True),
        Field("claimed gain", lambda task: gain_text(task.retained_gain, task.precision), right=True),
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
