"""Shell completion of names: reads the store without waiting, and never raises."""

from __future__ import annotations


def complete_task(incomplete: str) -> list[str]:
    """Return the names of tasks that start as typed."""
    return [name for name in _names("tasks") if name.startswith(incomplete)]


def complete_base(incomplete: str) -> list[str]:
    """Return the names of base models that start as typed."""
    return [name for name in _names("bases") if name.startswith(incomplete)]


def _names(which: str) -> list[str]:
    try:
        from icm_cli.config import cache_folder, load_settings
        from icmlora.fleet import admin as listing
        from icmlora.fleet.context import Context

        context = Context(load_settings().store.value, cache_folder(), lock_timeout=0.0, command="icm completion")
        return listing.task_names(context) if which == "tasks" else listing.base_names(context)
    except Exception:  # a shell waits for an answer; there is nobody to tell
        return []
