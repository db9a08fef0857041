"""Hints that several packages give. Never imports SQLAlchemy."""

from __future__ import annotations

from collections.abc import Mapping

from registry.names import some


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
            f"or `icm rm {made[0]}` and generate it again afterwards"
        )
    again = "the folders that `icm generate` wrote, or remove them with `icm rm` and generate them again afterwards"
    if len(made) == len(generated):
        return f"run `icm ingest --restore PATH` with {again}"
    return f"run `icm ingest --restore PATH` with the original folders; for the generated {some(made)}, use {again}"
