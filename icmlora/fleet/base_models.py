"""Record where base models are on this machine, and find them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from icmlora.base_models.lookup import find_base_model, inspect_base
from icmlora.errors import BaseModelNotFound
from icmlora.fleet.context import Context
from registry.records import BaseModelRecord


@dataclass(frozen=True)
class KnownBase:
    """A base model that an adapter names or that the user added."""

    record: BaseModelRecord
    path: Path | None  # where a local copy is
    problem: str | None  # why there is no usable copy


def list_base_models(context: Context) -> list[KnownBase]:
    """Return the base models of the store and where each one is."""
    with context.open(read_only=True) as store:
        return [_locate(record) for record in store.base_models.all()]


def add_base_model(context: Context, name: str, path: Path) -> Path:
    """Record where a base model is, and create the store if there is none."""
    found = inspect_base(name, path.expanduser().absolute())
    with context.open(create=True) as store:
        store.base_models.set_path(name, str(found.path))
    return found.path


def forget_base_model(context: Context, name: str) -> None:
    """Forget where a base model is. Its adapters and files stay."""
    with context.open() as store:
        if name not in {record.name for record in store.base_models.all()}:
            raise BaseModelNotFound(f"no base model is called {name!r}", hint="`icm base ls` lists them")
        store.base_models.set_path(name, None)


def _locate(record: BaseModelRecord) -> KnownBase:
    aliases = {} if record.path is None else {record.name: record.path}
    try:
        return KnownBase(record, find_base_model(record.name, aliases=aliases).path, None)
    except BaseModelNotFound as error:
        return KnownBase(record, None, str(error))
