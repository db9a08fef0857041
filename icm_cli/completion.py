"""Complete names in a shell: reads the store without waiting, and never raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icmlora.fleet.api import Fleet


def complete_task(incomplete: str) -> list[str]:
    """Return the names of tasks that start as typed."""
    try:
        return [row.task.name for row in _fleet().tasks() if row.task.name.startswith(incomplete)]
    except Exception:  # a shell waits for an answer, and nobody would read an error
        return []


def complete_base(incomplete: str) -> list[str]:
    """Return the names of base models that start as typed."""
    try:
        return [base.record.name for base in _fleet().base_models() if base.record.name.startswith(incomplete)]
    except Exception:  # see above
        return []


def _fleet() -> Fleet:
    from icm_cli.config import cache_folder, load_settings
    from icmlora.fleet.api import Fleet

    return Fleet(load_settings().store.value, cache=cache_folder, lock_timeout=0.0, command="icm completion")
