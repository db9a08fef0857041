"""Hints for evicted tasks of a store, which have a code and no original."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from sqlalchemy import select

from registry import schema as models
from registry.hints import restore_hint
from registry.storage.row_writer import in_parts

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def restore_hint_of(session: Session, names: Collection[str]) -> str:
    """Return how to restore some evicted tasks of the store."""
    adapter, generated = models.Adapter, dict.fromkeys(names, False)
    for part in in_parts(sorted(names)):
        query = select(models.Task.name, adapter.is_generated, models.Task.crc, adapter.crc)
        query = query.join(adapter, adapter.task_id == models.Task.id).where(models.Task.name.in_(part))
        generated.update(
            (name, is_generated) for name, is_generated, *_ in session.execute(query.where(adapter.is_final))
        )
    return restore_hint(generated)
