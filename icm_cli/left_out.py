"""Tell which base models a command could not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icm_cli.output import Output
    from icmlora.fleet.failures import BaseModelLeftOut


def tell_left_out(out: Output, left_out: Sequence[BaseModelLeftOut], what: str) -> bool:
    """Print what was left out, and return whether some of it ought to work.

    Args:
        out: Where to print.
        left_out: Base models with their tasks.
        what: What was not done with the tasks, as "not measured".
    """
    for base in left_out:
        text = left_out_text(base, what)
        if base.is_unsuited:
            out.event("left_out", **asdict(base))
            out.note(text)
            continue
        fields = {"base_model": base.base_model, "tasks": list(base.tasks), "hint": base.hint}
        out.warn(text, kind="base_model_left_out", **fields)
        if base.hint is not None:
            out.hint(base.hint)
    return any(not base.is_unsuited for base in left_out)


def left_out_text(base: BaseModelLeftOut, what: str) -> str:
    """Say which tasks of a base model were left out, and why."""
    return f"{what}: {counted(len(base.tasks), 'task')} ({some(base.tasks)}), because {base.reason}"
