"""Which base models the store knows, and where they are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.workflows.opening import Place
from icmlora.base_lookup import find_base_model, inspect_base
from icmlora.errors import BaseModelNotFound
from registry.records import BaseModelRecord


@dataclass(frozen=True)
class KnownBase:
    """A base model of the store.

    Attributes:
        record: What the store has.
        path: Where a local copy is, or None.
        problem: Why there is none, or None.
    """

    record: BaseModelRecord
    path: Path | None
    problem: str | None


def known_bases(place: Place) -> list[KnownBase]:
    """Return the base models that adapters name or that were added, and where each one is."""
    with place.open(read_only=True) as store:
        return [_locate(record) for record in store.base_models()]


def with_local_base(place: Place, names: Sequence[str]) -> list[str]:
    """Return those of some tasks whose base model is on this machine."""
    with place.open(read_only=True) as store:
        found = {base.name for base in store.base_models() if _locate(base).path is not None}
        return [name for name in names if store.task(name).base_model in found]


def add_base(place: Place, name: str, path: Path) -> Path:
    """Record where a base model is; the store is made if there is none.

    Raises:
        BaseModelNotFound: There is no base model that could be loaded.
    """
    found = inspect_base(name, path.expanduser().absolute())
    with place.open(create=True) as store:
        store.set_base_alias(name, str(found.path))
    return found.path


def forget_base(place: Place, name: str) -> None:
    """Forget where a base model is; its adapters stay.

    Raises:
        BaseModelNotFound: The store does not know the name.
    """
    with place.open() as store:
        if name not in {record.name for record in store.base_models()}:
            raise BaseModelNotFound(f"no base model is called {name!r}", hint="`icm base ls` lists them")
        store.set_base_alias(name, None)


def _locate(record: BaseModelRecord) -> KnownBase:
    aliases = {} if record.path is None else {record.name: record.path}
    try:
        return KnownBase(record, find_base_model(record.name, aliases=aliases).path, None)
    except BaseModelNotFound as error:
        return KnownBase(record, None, str(error))
