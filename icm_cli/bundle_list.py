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
    from icmlora.fleet.bundles.bundles import Bundle
    from registry.manifests import Task


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


def _fields(bundle: Bundle) -> list[Field[Task]]:
    return [
        Field("task", lambda task: task.name, shrink=True),
        Field("base model", lambda task: bundle.base_model, shrink=True),
        Field("rank", lambda task: str(task.final.rank_max), right=True),
        Field("targets", lambda task: ",".join(in_ranges(task.final.target_modules)), shrink=True),
        Field("original", lambda task: human_size(task.final.original_bytes), right=True),
        Field("code", lambda task: human_size(_code_size(task)), right=True),
        Field("claimed error", lambda task: figure(errors_json(_claim(task)[0])["relative_error"]), right=True),
        Field("claimed gain", lambda task: gain_text(*_claim(task)[1:]), right=True),
    ]


def _as_json(bundle: Bundle, task: Task) -> dict[str, object]:
    error, gain, precision = _claim(task)
    return {
        "name": task.name,
        "base_model": bundle.base_model,
        "rank": task.final.rank_max,
        "dtype": task.final.dtype.lower(),
        "parameters": task.final.parameters,
        "target_modules": list(task.final.target_modules),
        "original_size": task.final.original_bytes,
        "code_size": _code_size(task),
        **errors_json(error),
        "retained_gain": gain,
        "precision": precision,
    }


def _code_size(task: Task) -> int:
    return 0 if task.code is None else task.code.size


def _claim(task: Task) -> tuple[float | None, float | None, str | None]:
    """Return the squared error, the retained gain and the precision that the bundle claims."""
    claim = None if task.code is None else task.code.claim
    return (None, None, None) if claim is None else (claim.squared_error, claim.retained_gain, claim.precision)
