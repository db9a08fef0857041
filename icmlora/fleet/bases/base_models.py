"""Record where base models are on this machine and what else they are called, and find them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.finding.fingerprint import is_same_model
from icmlora.base_models.finding.labels import named_by, typed_label
from icmlora.base_models.finding.locations import Location, find_located, location_of, locations, set_location
from icmlora.base_models.finding.lookup import FoundBase, check_load_in, inspect_base
from icmlora.base_models.kinds.custom_model import find_loader
from icmlora.errors import BaseModelNotFound
from icmlora.fleet.bases.joins import BaseJoined
from icmlora.fleet.bases.labels import Joined, Separated, join, separate
from icmlora.fleet.context import Context, Event, use_case
from registry.errors import BaseModelConflict, StoreNotFound, StoreReadOnly, StoreUnavailable
from registry.manifests import BaseModel
from registry.names import LoadIn, some

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class KnownBase:
    """A base model that an adapter names or that the user added."""

    base: BaseModel
    tasks: int
    location: Location | None  # that the user set on this machine
    path: Path | None  # where a local copy is
    problem: str | None  # why there is no usable copy


@dataclass(frozen=True)
class NameTaken(Event):
    """A relative path was taken for the name of a base model."""

    name: str
    base_model: str


@use_case
def list_base_models(context: Context) -> list[KnownBase]:
    """List the base models that adapters name or that were added, and where each one is on this machine."""
    with context.open(read_only=True) as store:
        counts, places = store.task_counts(), locations()
        return [
            _locate(base, counts.get(base.name, 0), location_of(base.names, places))
            for base in _known_bases(store.base_models())
        ]


def _known_bases(stored: Sequence[BaseModel]) -> list[BaseModel]:
    """Return the base models of a store and those with a location on this machine, by name."""
    named = {name for base in stored for name in base.names}
    return sorted([*stored, *(BaseModel(name=name) for name in locations().keys() - named)], key=lambda base: base.name)


@use_case
def add_base_model(
    context: Context, name: str, path: str | Path, *, loader: str | None = None, load_in: LoadIn | None = None
) -> Path:
    """Record where a base model is; this comes before the Hugging Face cache. Creates the store if there is none.

    A base model with equal files is joined to it in the store, which `on_event` is told.

    Args:
        context: The store.
        name: The name that adapters give the base model.
        path: A Hugging Face model folder or a `.gguf` file; anything if there is a loader.
        loader: `MODULE:FUNCTION` of a function marked with `icmlora.base_model_loader`, for a base model that
            transformers does not load.
        load_in: "nf4" or "int8": load the linear layers in 4 or 8 bits, with bitsandbytes. Everything is then
            measured on that, and says so. None, also for a known base model, means what the device suits.

    Returns:
        The absolute path.

    Raises:
        BaseModelNotFound: The path does not hold a base model that can be loaded, there is no such loader, or
            bitsandbytes is not installed.
        BaseModelUnsuited: It is of a kind that cannot be loaded in few bits.
    """
    path = Path(path)
    found = replace(inspect_base(name, path.expanduser().absolute(), loader), load_in=load_in)
    # What cannot be used is told now.
    check_load_in(found)
    if loader is not None:
        find_loader(name, loader)
    if load_in is not None:
        modality_of(found)
    with context.open(create=True) as store:
        bases = _known_bases(store.base_models())
    meant = _meant(bases, name)
    if meant != name:
        context.on_event(NameTaken(name, meant))
        name, found = meant, replace(found, label=meant)
    mine = next((base for base in bases if name in base.names), BaseModel(name=name))
    for label in {name, *locations().keys() & set(mine.names)}:  # the later location counts, whatever the name
        set_location(label, Location(found.path, loader, load_in))
    _join_same(context, bases, mine, found)
    return found.path


def _meant(bases: Sequence[BaseModel], name: str) -> str:
    """Return the base model that a relative path means: one that adapters name so, or that path from here."""
    known = {label: base.name for base in bases for label in base.names}
    found = sorted({known[label] for label in named_by(name, list(known))})
    if name in known or len(found) == 1:
        return name if name in known else found[0]
    if found:
        fact = f"{name} matches {len(found)} base models: {some(found)}"
        raise BaseModelConflict(fact, hint="use the full name; run `icm base ls` to list them")
    return typed_label(name)


def _join_same(context: Context, bases: Sequence[BaseModel], mine: BaseModel, found: FoundBase) -> None:
    """Join a base model to one of the same files; where both have a generator, the user has to say which stays."""
    for other in (base for base in bases if base.name != mine.name):
        try:
            copy = find_located(other.names)
        except BaseModelNotFound:
            continue
        if not is_same_model(found, copy):
            continue
        # The location is recorded even if both have a generator, or if this user only reads the store.
        with suppress(BaseModelConflict, StoreReadOnly, StoreUnavailable), context.open() as store:
            first, second = (mine, other) if store.generator(mine.name) is not None else (other, mine)
            join(store, first.name, [second.name], reason="fingerprint")
            context.on_event(BaseJoined(second.name, first.name, "fingerprint", is_quantised=False))
        return


@use_case
def forget_base_model(context: Context, name: str) -> None:
    """Forget where the base model `name` is; `BaseModelNotFound` if it is unknown. Adapters and files stay."""
    names = {name}
    with suppress(StoreNotFound), context.open(read_only=True) as store:
        names |= {*store.base_model(name).names}
        if name not in locations() and all(name not in base.names for base in store.base_models()):
            raise BaseModelNotFound(f"no base model is named {name!r}", hint="run `icm base ls` to list them")
    for known in names & locations().keys():
        set_location(known, None)


@use_case
def alias_base_model(context: Context, name: str, labels: Sequence[str], *, keep: str | None = None) -> Joined:
    """Say that labels mean the same base model: their tasks share one generator from then on.

    Codes stay valid. Where only one of them has a generator, it becomes that of all; `update` makes codes for the
    other tasks. Creates the store if there is none.

    Args:
        context: The store.
        name: A label of the base model; it is shown under the name that it has, or under this one if it is new.
        labels: Hub names, `NAME@REVISION`, or local paths.
        keep: Where several have a generator, the label of the one whose generator stays in use. The others
            become earlier versions of it, and their tasks have no code until `update`.

    Raises:
        BaseModelConflict: Two have a generator and `keep` is not given, or a label belongs to another base model.
    """
    with context.open(create=True) as store:
        name = typed_label(name)
        return join(store, name, [typed_label(label) for label in labels], keep=keep)


@use_case
def separate_labels(context: Context, name: str, labels: Sequence[str]) -> list[Separated]:
    """Make labels of a base model base models of their own again, with the tasks whose adapters name them.

    If no task stays, the generator goes with them. Otherwise these tasks lose codes, vectors and measurements.

    Args:
        context: The store.
        name: The base model.
        labels: Labels that were joined to it.

    Raises:
        BaseModelConflict: A label is not one of this base model.
    """
    with context.open() as store:
        base = store.base_name(typed_label(name))
        labels = [typed_label(label) for label in labels]
        for label in labels:
            if label == base or store.base_name(label) != base:
                is_main = f"{label!r} is its main name and cannot be removed"
                fact = is_main if label == base else f"{label!r} is not a label of {base!r}"
                raise BaseModelConflict(fact, hint="run `icm base ls` to list all labels")
        return [separate(store, label) for label in labels]


def _locate(base: BaseModel, tasks: int, location: Location | None) -> KnownBase:
    try:
        return KnownBase(base, tasks, location, find_located(base.names).path, None)
    except BaseModelNotFound as error:
        return KnownBase(base, tasks, location, None, str(error))
