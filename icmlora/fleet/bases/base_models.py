"""Record where base models are on this machine and what else they are called, and find them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

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
from icmlora.fleet.params import Loader, Param
from registry.errors import BaseModelConflict, StoreNotFound, StoreReadOnly, StoreUnavailable
from registry.manifests import BaseRecord
from registry.names import LoadIn, some

BaseName = Annotated[str, Param("Base model name, as given in the adapters.", "NAME", completes="base")]
Labels = Annotated[
    Sequence[str],
    Param("Other names of the model: a hub name, NAME@REVISION or a path.", "LABEL...", completes="base"),
]


@dataclass(frozen=True)
class KnownBase:
    """A base model that an adapter names or that the user added."""

    base: BaseRecord
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
def list_base_models(
    context: Context,
) -> list[KnownBase]:
    """List base models with their aliases and locations.

    Example:
      icm base ls
    """
    with context.open(read_only=True) as store:
        counts, places = store.task_counts(), locations()
        return [
            _locate(base, counts.get(base.name, 0), location_of(base.names, places))
            for base in _known_bases(store.base_models())
        ]


def _known_bases(stored: Sequence[BaseRecord]) -> list[BaseRecord]:
    """Return the base models of a store and those with a location on this machine, by name."""
    named = {name for base in stored for name in base.names}
    return sorted(
        [*stored, *(BaseRecord(name=name) for name in locations().keys() - named)], key=lambda base: base.name
    )


@use_case
def add_base_model(
    context: Context,
    name: BaseName,
    path: Annotated[
        str | Path, Param("A Hugging Face model or diffusers pipeline as a folder, or a .gguf file.", "PATH")
    ],
    *,
    loader: Loader = None,
    load_in: Annotated[
        LoadIn | None,
        Param(
            "Load linear layers in 4 or 8 bits with bitsandbytes. Default: full precision suited to the device.",
            "--load-in nf4|int8",
        ),
    ] = None,
) -> Path:
    """Set the location of a base model on this machine.

    PATH takes precedence over the Hugging Face cache. If the store has a base model with identical files, the two are
    joined as by `icm base alias`. A relative path as NAME matches adapters that use this path, or the path from the
    current folder.

    --load-in needs a fraction of the memory but changes the model: task vectors, losses and retained gains are measured
    on the quantised model and marked with its precision. Run the command without --load-in to undo this.

    Example:
      icm base add meta-llama/Llama-3.1-8B ./llama-8b --load-in nf4
      icm base add nanodet-g ./nanodet --loader my_models:nanodet

    Raises:
        BaseModelNotFound: The path does not hold a base model that can be loaded, there is no such loader, or
            bitsandbytes is not installed.
        BaseModelUnsuited: It is of a kind that cannot be loaded in few bits.
    """
    path = Path(path)
    found = replace(inspect_base(name, path.expanduser().absolute(), loader), load_in=load_in)
    # Report unusable settings now.
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
    mine = next((base for base in bases if name in base.names), BaseRecord(name=name))
    for label in {name, *locations().keys() & set(mine.names)}:  # the later location counts, whatever the name
        set_location(label, Location(found.path, loader, load_in))
    _join_same(context, bases, mine, found)
    return found.path


def _meant(bases: Sequence[BaseRecord], name: str) -> str:
    """Return the base model that a relative path means: one that adapters name so, or that path from here."""
    known = {label: base.name for base in bases for label in base.names}
    found = sorted({known[label] for label in named_by(name, list(known))})
    if name in known or len(found) == 1:
        return name if name in known else found[0]
    if found:
        fact = f"{name} matches {len(found)} base models: {some(found)}"
        raise BaseModelConflict(fact, hint="use the full name; run `icm base ls` to list them")
    return typed_label(name)


def _join_same(context: Context, bases: Sequence[BaseRecord], mine: BaseRecord, found: FoundBase) -> None:
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
def forget_base_model(
    context: Context,
    name: BaseName,
) -> None:
    """Forget the location of a base model. Its adapters and files are kept.

    Example:
      icm base rm HuggingFaceTB/SmolLM2-135M-Instruct
    """
    names = {name}
    with suppress(StoreNotFound), context.open(read_only=True) as store:
        names |= {*store.base_model(name).names}
        if name not in locations() and all(name not in base.names for base in store.base_models()):
            raise BaseModelNotFound(f"no base model is named {name!r}", hint="run `icm base ls` to list them")
    for known in names & locations().keys():
        set_location(known, None)


@use_case
def alias_base_model(
    context: Context,
    name: BaseName,
    labels: Labels,
    *,
    keep: Annotated[
        str | None,
        Param("If several have a generator, use the generator of NAME.", "--keep NAME", completes="base"),
    ] = None,
) -> Joined:
    """Treat other names as the same base model.

    A label may be a mirror, a local copy or a revision. Tasks of all labels share one generator, and existing codes
    stay valid. If only one of the models has a generator, all tasks use it; run `icm train --update` to encode the
    other tasks. If several have one, select it with --keep. The others become earlier versions.

    With --remove, tasks whose adapters name LABEL are separated from NAME and lose their codes, vectors and
    measurements. If no task remains under NAME, they keep everything, and the generator moves with them.

    Example:
      icm base alias meta-llama/Llama-3.1-8B ./llama-8b
      icm base alias google/gemma-2-2b google/gemma-2-2b@c5ebcd4

    Raises:
        BaseModelConflict: Two have a generator and `keep` is not given, or a label belongs to another base model.
    """
    with context.open(create=True) as store:
        name = typed_label(name)
        return join(store, name, [typed_label(label) for label in labels], keep=keep)


@use_case
def separate_labels(context: Context, name: BaseName, labels: Labels) -> list[Separated]:
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


def _locate(base: BaseRecord, tasks: int, location: Location | None) -> KnownBase:
    try:
        return KnownBase(base, tasks, location, find_located(base.names).path, None)
    except BaseModelNotFound as error:
        return KnownBase(base, tasks, location, None, str(error))
