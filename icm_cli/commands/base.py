"""`icm base`: the base models of the store, where they are on this machine, and what else they are called."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.errors import UsageProblem
from icm_cli.options import LoaderOpt, argument, option
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import joined_text
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bases.base_models import KnownBase
    from icmlora.fleet.context import Event

NameArg = Annotated[str, argument("NAME", "Name of the base model, as adapters give it.", completes="base")]
PathArg = Annotated[Path, argument("PATH", "A Hugging Face model or diffusers pipeline as a folder, or a .gguf file.")]
LabelsArg = Annotated[
    list[str], argument("LABEL...", "What else it is called: a hub name, NAME@REVISION or a path.", completes="base")
]
KeepOpt = Annotated[
    str | None, option("--keep NAME", "Where several have a generator: whose stays in use.", completes="base")
]
RemoveOpt = Annotated[bool, option("--remove", "Make the labels base models of their own again.")]
LoadInOpt = Annotated[
    Literal["nf4", "int8"] | None,
    option(
        "--load-in nf4|int8",
        "Load its linear layers in 4 or 8 bits, with bitsandbytes. Default: what the device suits.",
    ),
]

_COLUMNS = (Column("base model"), Column("tasks", right=True), Column("path", shrink=True))


@command
def add(session: Session, name: NameArg, path: PathArg, loader: LoaderOpt = None, load_in: LoadInOpt = None) -> None:
    """Tell icm where the base model NAME is. This path is preferred to the Hugging Face cache.

    If the store has a base model with the same files, the two are joined, as `icm base alias` does. A NAME such as
    ./model is the base model that adapters of the store call so, or that path from the current directory.

    With --load-in a base model takes a fraction of the memory, and is another one: task vectors, losses and retained
    gains are measured on it as it is then, and say so. Without --load-in, the same command sets it back.

    Example:
      icm base add HuggingFaceTB/SmolLM2-135M-Instruct ./smollm2
      icm base add meta-llama/Llama-3.1-8B ./llama-8b --load-in nf4
      icm base add nanodet-g ./nanodet --loader my_models:nanodet
    """
    from icmlora.fleet.bases.base_models import NameTaken, add_base_model
    from icmlora.fleet.bases.joins import BaseJoined

    heard: list[Event] = []
    with session.working("base add", heard.append) as context:
        recorded = add_base_model(context, name, path, loader=loader, load_in=load_in)
    for event in heard:
        if isinstance(event, NameTaken):
            session.out.note(f"{name} is taken for {event.base_model}")
            name = event.base_model
    joined = [event for event in heard if isinstance(event, BaseJoined)]
    document = {"name": name, "path": str(recorded), "loader": loader, "load_in": load_in}
    session.out.document(document | {"joined": [asdict(join) for join in joined]})
    how = f", loaded by {loader}" if loader else f", loaded in {load_in}" if load_in else ""
    session.out.line(f"{name} is at {recorded}{how}")
    for join in joined:
        session.out.note(joined_text(join))


@command
def alias(session: Session, name: NameArg, labels: LabelsArg, keep: KeepOpt = None, remove: RemoveOpt = False) -> None:
    """Say that LABEL is the base model NAME too: a mirror, a local copy, a revision. Their tasks share one generator.

    Codes stay valid. If only one of them has a generator, it becomes the generator of all; run `icm train --update` to
    make codes for the other tasks. If both have one, --keep NAME says whose stays in use; the other one becomes an
    earlier version.

    With --remove, tasks whose adapters name LABEL leave NAME. They lose their codes, vectors and measurements, unless
    no task stays: then the generator goes with them.

    Example:
      icm base alias meta-llama/Llama-3.1-8B ./llama-8b
      icm base alias google/gemma-2-2b google/gemma-2-2b@c5ebcd4
    """
    from icmlora.fleet.bases.base_models import alias_base_model

    if remove and keep is not None:
        raise UsageProblem("--keep and --remove cannot be used together")
    if remove:
        _separate(session, name, labels)
        return
    joined = alias_base_model(session.context, name, labels, keep=keep)
    session.out.document(asdict(joined))
    if not joined.labels:
        session.out.line(f"{joined.name} has these labels already")
        return
    moved = f"; {counted(joined.tasks, 'task')} came with them" if joined.tasks else ""
    session.out.line(f"{', '.join(joined.labels)}: joined to {joined.name}{moved}")
    if joined.without_code:
        session.out.note(f"{counted(len(joined.without_code), 'task')} without a code under the generator that stays")
    if joined.tasks:
        session.out.hint("run `icm train --update` to make codes for tasks that have none")


def _separate(session: Session, name: str, labels: list[str]) -> None:
    from icmlora.fleet.bases.base_models import separate_labels

    separated = separate_labels(session.context, name, labels)
    session.out.document([asdict(entry) for entry in separated])
    for entry in separated:
        lost = f"; {counted(entry.codes, 'code')} deleted" if entry.codes else ""
        session.out.line(f"{entry.label}: a base model of its own, with {counted(entry.tasks, 'task')}{lost}")


@command
def ls(session: Session) -> None:
    """List the base models of the store, what else they are called, and where each one is on this machine.

    Example:
      icm base ls
    """
    from icmlora.fleet.bases.base_models import list_base_models

    bases = list_base_models(session.context)
    session.out.document([_document(base) for base in bases])
    session.out.names(base.record.name for base in bases)
    rows: list[list[str]] = []
    for base in bases:
        rows.append([base.record.name, str(base.record.tasks), str(base.path or "not found")])
        if base.record.loader is not None:
            rows.append(["", "", f"loaded by {base.record.loader}"])
        if base.record.load_in is not None:
            rows.append(["", "", f"loaded in {base.record.load_in}"])
        rows.extend([f"  {label.label}", "", _REASONS[label.reason]] for label in base.record.labels)
    session.out.table(_COLUMNS, rows)
    if any(base.path is None for base in bases):
        session.out.hint("run `icm base add NAME PATH` to tell icm where a base model is")


_REASONS = {
    "told": "the same model, as you said",
    "fingerprint": "the same model: equal files",
    "mirror": "the same model: a known mirror",
}


def _document(base: KnownBase) -> dict[str, object]:
    from icmlora.base_models.finding.mirrors import original_of

    return {
        "name": base.record.name,
        "labels": [
            {"label": entry.label, "reason": entry.reason, "is_quantised": original_of(entry.label).is_quantised}
            for entry in base.record.labels
        ],
        "tasks_count": base.record.tasks,
        "path": None if base.path is None else str(base.path),
        "alias": base.record.path,
        "loader": base.record.loader,
        "load_in": base.record.load_in,
        "fingerprint": base.record.fingerprint,
        "problem": base.problem,
    }


@command
def rm(session: Session, name: NameArg) -> None:
    """Forget where the base model NAME is. Its adapters and files stay.

    Example:
      icm base rm HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from icmlora.fleet.bases.base_models import forget_base_model

    forget_base_model(session.context, name)
    session.out.document({"name": name, "path": None})
    session.out.line(f"forgot where {name} is")


base = typer.Typer(
    name="base", help="List base models, tell icm where they are, and what else they are called.", no_args_is_help=True
)
base.command()(add)
base.command()(alias)
base.command()(ls)
base.command()(rm)
