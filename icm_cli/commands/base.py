"""`icm base`: list the base models of the store, and set their locations and aliases."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.command import Call, command
from icm_cli.output import Column
from icm_cli.session import Session
from icm_cli.text import joined_text
from icmlora.base_models.finding.mirrors import original_of
from icmlora.fleet.bases.base_models import (
    KnownBase,
    NameTaken,
    add_base_model,
    alias_base_model,
    forget_base_model,
    list_base_models,
    separate_labels,
)
from icmlora.fleet.bases.joins import BaseJoined
from icmlora.fleet.params import Param
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bases.labels import Joined, Separated
    from icmlora.fleet.context import Event

_COLUMNS = (Column("base model"), Column("tasks", right=True), Column("path", shrink=True))


@command(add_base_model)
def add(session: Session, call: Call[Path]) -> None:
    events: list[Event] = []
    recorded = call.run(events.append, "base add")
    name, loader, load_in = call["name"], call["loader"], call["load_in"]
    for event in events:
        if isinstance(event, NameTaken):
            session.out.note(f"treating {name} as {event.base_model}")
            name = event.base_model
    joined = [event for event in events if isinstance(event, BaseJoined)]
    document = {"name": name, "path": str(recorded), "loader": loader, "load_in": load_in}
    session.out.document(document | {"joined": [asdict(join) for join in joined]})
    how = f", loaded by {loader}" if loader else f", loaded in {load_in}" if load_in else ""
    session.out.line(f"set location of {name} to {recorded}{how}")
    for join in joined:
        session.out.note(joined_text(join))


RemoveOpt = Annotated[bool, Param("Turn the labels back into separate base models.", "--remove")]


@command(alias_base_model)
def alias(session: Session, call: Call[Joined], remove: RemoveOpt = False) -> None:
    if remove:
        _separate(session, call.of(separate_labels, "--remove"))
        return
    joined = call.now()
    session.out.document(asdict(joined))
    if not joined.labels:
        session.out.line(f"{joined.name} already has these labels")
        return
    moved = f" with {counted(joined.tasks, 'task')}" if joined.tasks else ""
    session.out.line(f"joined {', '.join(joined.labels)} to {joined.name}{moved}")
    if joined.without_code:
        session.out.note(f"{counted(len(joined.without_code), 'task')} without a code under the current generator")
    if joined.tasks:
        session.out.hint("run `icm train --update` to encode tasks without a code")


def _separate(session: Session, call: Call[list[Separated]]) -> None:
    separated = call.now()
    session.out.document([asdict(entry) for entry in separated])
    for entry in separated:
        lost = f"; deleted {counted(entry.codes, 'code')}" if entry.codes else ""
        session.out.line(f"separated {entry.label} with {counted(entry.tasks, 'task')}{lost}")


@command(list_base_models)
def ls(session: Session, call: Call[list[KnownBase]]) -> None:
    bases = call.now()
    session.out.document([_document(base) for base in bases])
    session.out.names(base.base.name for base in bases)
    rows: list[list[str]] = []
    for base in bases:
        rows.append([base.base.name, str(base.tasks), str(base.path or "not found")])
        if base.location is not None and base.location.loader is not None:
            rows.append(["", "", f"loaded by {base.location.loader}"])
        if base.location is not None and base.location.load_in is not None:
            rows.append(["", "", f"loaded in {base.location.load_in}"])
        rows.extend([f"  {label.label}", "", _REASONS[label.reason]] for label in base.base.labels)
    session.out.table(_COLUMNS, rows)
    if any(base.path is None for base in bases):
        session.out.hint("run `icm base add NAME PATH` to set the location of a base model")


_REASONS = {
    "told": "alias",
    "fingerprint": "alias (identical files)",
    "mirror": "alias (known mirror)",
}


def _document(base: KnownBase) -> dict[str, object]:

    return {
        "name": base.base.name,
        "labels": [
            {"label": entry.label, "reason": entry.reason, "is_quantised": original_of(entry.label).is_quantised}
            for entry in base.base.labels
        ],
        "tasks_count": base.tasks,
        "path": None if base.path is None else str(base.path),
        "alias": None if base.location is None else str(base.location.path),
        "loader": None if base.location is None else base.location.loader,
        "load_in": None if base.location is None else base.location.load_in,
        "fingerprint": base.base.fingerprint,
        "problem": base.problem,
    }


@command(forget_base_model)
def rm(session: Session, call: Call[None]) -> None:
    call.now()
    name = call["name"]
    session.out.document({"name": name, "path": None})
    session.out.line(f"forgot the location of {name}")


base = typer.Typer(name="base", help="List base models and set their locations and aliases.", no_args_is_help=True)
base.command()(add)
base.command()(alias)
base.command()(ls)
base.command()(rm)
