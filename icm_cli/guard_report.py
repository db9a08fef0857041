"""Print what a context and an adapter are worth: by `icm context` and `icm generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icm_cli.output import Field
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icm_cli.session import Session
    from icmlora.fewshot.guard import Guard

_FIELDS: tuple[Field[tuple[str, float, bool]], ...] = (
    Field("served", lambda row: row[0]),
    Field("nats per token", lambda row: f"{row[1]:.3f}", right=True),
    Field("", lambda row: "recommended" if row[2] else ""),
)
_TOO_FEW = "not measured: with 8 or more samples, icm leaves 4 out and measures on them"
_SERVE = {"neither": "neither", "context": "the context alone", "adapter": "the adapter alone", "both": "both"}


def tell_guard(session: Session, guard: Guard | None) -> None:
    """Print a table of four losses, or why there is none."""
    if guard is None:
        session.out.note(_TOO_FEW)
        return
    unseen = f"{counted(guard.samples, 'sample')} that neither context nor adapter saw"
    session.out.note(f"measured on {guard.told_by if guard.in_turn else unseen}:")
    session.out.listing(_FIELDS, [(name, nats, name == guard.recommended) for name, nats in guard.losses.items()])


def guard_text(guard: Guard | None) -> str:
    """Say the same in one line."""
    if guard is None:
        return _TOO_FEW
    also = " (the adapter is measured from 8 samples on)" if guard.adapter is None else ""
    return f"nats per token on {guard.told_by}: {guard.figures}; serve {_SERVE[guard.recommended]}{also}"


def guard_json(guard: Guard | None) -> dict[str, object] | None:
    """Return the losses under their names, and what to serve."""
    if guard is None:
        return None
    return {
        "neither": guard.neither,
        "context": guard.context,
        "adapter": guard.adapter,
        "both": guard.both,
        "samples_count": guard.samples,
        "in_turn": guard.in_turn,
        "recommended": guard.recommended,
    }
