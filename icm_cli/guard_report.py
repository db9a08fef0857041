"""Print the losses with and without a context and an adapter, for `icm context` and `icm generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.output import Field
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icm_cli.session import Session
    from icmlora.fewshot.guard import AblationReport

_FIELDS: tuple[Field[tuple[str, float, bool]], ...] = (
    Field("served", lambda row: row[0]),
    Field("nats per token", lambda row: f"{row[1]:.3f}", right=True),
    Field("", lambda row: "recommended" if row[2] else ""),
)
_TOO_FEW = "not measured: too few samples (with 8 or more, icm holds out 4 to measure on)"
_SERVE = {"neither": "neither", "context": "the context alone", "adapter": "the adapter alone", "both": "both"}


def print_guard(session: Session, guard: AblationReport | None) -> None:
    """Print a table of up to four losses, or the reason why nothing was measured."""
    if guard is None:
        session.out.note(_TOO_FEW)
        return
    session.out.note(f"measured on {_samples(guard)}:")
    session.out.listing(_FIELDS, [(name, nats, name == guard.recommended) for name, nats in guard.losses.items()])


def guard_text(guard: AblationReport | None) -> str:
    """Return the losses and the recommendation as one line."""
    if guard is None:
        return _TOO_FEW
    also = " (measuring the adapter needs 8 samples)" if guard.adapter is None else ""
    figures = f"nats per token on {_samples(guard)}: {guard.figures}"
    return f"{figures}; recommended: serve {_SERVE[guard.recommended]}{also}"


def _samples(guard: AblationReport) -> str:
    if guard.leave_one_out:  # leave-one-out
        return f"{counted(guard.samples, 'sample')}, each with the others as context"
    return counted(guard.samples, "held-out sample")


def guard_json(guard: AblationReport | None) -> dict[str, object] | None:
    """Return the losses and the recommendation for JSON."""
    if guard is None:
        return None
    return {
        "neither": guard.neither,
        "context": guard.context,
        "adapter": guard.adapter,
        "both": guard.both,
        "samples_count": guard.samples,
        "leave_one_out": guard.leave_one_out,
        "recommended": guard.recommended,
    }
