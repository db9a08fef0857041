"""Look for damage in the store, and move damaged bytes out of the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from icm_cli.workflows.opening import Place
from registry.integrity import Finding


def find_damage(place: Place, *, names: Sequence[str], read_data: bool) -> Iterator[Finding]:
    """Yield what is wrong, as it is found.

    Args:
        place: The store.
        names: Only what these tasks need; everything if empty.
        read_data: Hash every blob, not only look at its length.

    Raises:
        TaskNotFound: A name is not in the store.
    """
    with place.open(read_only=True) as store:
        yield from store.verify(read_data=read_data, names=names)


def quarantine_damage(place: Place) -> list[tuple[Finding, Path]]:
    """Move every blob with wrong bytes to quarantine and return each with its new place."""
    with place.open() as store:
        return store.repair()
