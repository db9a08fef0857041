"""Match samples to a task, for `icm recognize` and deprecated options of `icm materialize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.config import cache_folder
from icm_cli.errors import UsageProblem
from icm_cli.session import Session

if TYPE_CHECKING:
    from icmlora.fleet.vectors.recognize import RecognizeReport


def recognized(
    session: Session,
    samples: Path,
    base_model: str | None,
    bundle: Path | None,
    loader: str | None,
    device: str | None,
) -> RecognizeReport:
    """Match samples to a task in the store or in a bundle. Raises the errors of `Fleet.recognize`."""
    from icmlora.fleet.vectors.recognize import recognize

    if loader is not None and (bundle is None or base_model is None):
        hint = "for a store, set the loader with `icm base add NAME PATH --loader MODULE:FUNCTION`"
        raise UsageProblem("--loader needs a bundle and --base-model PATH", hint=hint)

    if bundle is not None:
        from icmlora.fleet.bundles.bundles import Bundle

        return Bundle(bundle).recognize(
            samples, base_model=base_model, loader=loader, device=session.device(device), cache=cache_folder()
        )
    with session.working("recognize") as context:
        return recognize(context, samples, base_model=base_model, device=session.device(device))
