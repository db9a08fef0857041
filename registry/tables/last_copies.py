"""Hints for evicted tasks, which have a code and no original."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sqlalchemy import select

from registry import schema as models
from registry.names import some
from registry.storage.row_writer import in_parts

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def restore_hint(generated: Mapping[str, bool]) -> str:
    """Return how to restore evicted tasks, given as name -> whether a generator made the adapter.

    A generated task has no original, but the folder that `icm generate` wrote takes its place.
    """
    made = sorted(name for name, is_generated in generated.items() if is_generated)
    is_one = len(generated) == 1
    if not made:
        return f"run `icm ingest --restore PATH` with the {'folder of its original' if is_one else 'original folders'}"
    if is_one:
        return (
            "run `icm ingest --restore PATH` with the folder that `icm generate` wrote, "
            f"or `icm rm {made[0]}` and generate it again later"
        )
    again = "the folders that `icm generate` wrote, or remove them with `icm rm` and generate them again later"
    if len(made) == len(generated):
        return f"run `icm ingest --restore PATH` with {again}"
    return f"run `icm ingest --restore PATH` with the original folders; for the generated {some(made)}, use {again}"


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
