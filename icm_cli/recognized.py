"""Recognise the task of some samples, for `icm recognize` and an old spelling of `icm materialize`."""

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
    """Recognise the task of some samples among those of the store, or of a bundle; raises as `Fleet.recognize` does."""
    from icmlora.fleet.vectors.recognize import recognize

    if loader is not None and (bundle is None or base_model is None):
        hint = "in a store, `icm base add NAME PATH --loader` says what loads a base model"
        raise UsageProblem("--loader goes with a bundle and --base-model PATH", hint=hint)
    if bundle is not None:
        from icmlora.fleet.bundles.bundles import Bundle

        return Bundle(bundle).recognize(
            samples, base_model=base_model, loader=loader, device=session.device(device), cache=cache_folder()
        )
    with session.working("recognize") as context:
        return recognize(context, samples, base_model=base_model, device=session.device(device))
