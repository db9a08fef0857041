"""`icm base`: list the base models of the store, and set their locations and aliases."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import UsageProblem
from icm_cli.options import LoaderOpt, argument, option
from icm_cli.output import Column
from icm_cli.session import Session
from icm_cli.text import joined_text
from icmlora.io.text import counted

if TYPE_CHECKING:
    from icmlora.fleet.bases.base_models import KnownBase
    from icmlora.fleet.context import Event

NameArg = Annotated[str, argument("NAME", "Base model name, as given in the adapters.", completes="base")]
PathArg = Annotated[Path, argument("PATH", "A Hugging Face model or diffusers pipeline as a folder, or a .gguf file.")]
LabelsArg = Annotated[
    list[str], argument("LABEL...", "Other names of the model: a hub name, NAME@REVISION or a path.", completes="base")
]
KeepOpt = Annotated[
    str | None, option("--keep NAME", "If several have a generator, use the generator of NAME.", completes="base")
]
RemoveOpt = Annotated[bool, option("--remove", "Turn the labels back into separate base models.")]
LoadInOpt = Annotated[
    Literal["nf4", "int8"] | None,
    option(
        "--load-in nf4|int8",
        "Load linear layers in 4 or 8 bits with bitsandbytes. Default: full precision suited to the device.",
    ),
]

_COLUMNS = (Column("base model"), Column("tasks", right=True), Column("path", shrink=True))


@command
def add(session: Session, name: NameArg, path: PathArg, loader: LoaderOpt = None, load_in: LoadInOpt = None) -> None:
    """Set the location of a base model on this machine.

    PATH takes precedence over the Hugging Face cache. If the store has a base model with identical files, the two are
    joined as by `icm base alias`. A relative path as NAME matches adapters that use this path, or the path from the
    current folder.

    --load-in needs a fraction of the memory but changes the model: task vectors, losses and retained gains are measured
    on the quantised model and marked with its precision. Run the command without --load-in to undo this.

    Example:
      icm base add meta-llama/Llama-3.1-8B ./llama-8b --load-in nf4
      icm base add nanodet-g ./nanodet --loader my_models:nanodet
    """
    from icmlora.fleet.bases.base_models import NameTaken, add_base_model
    from icmlora.fleet.bases.joins import BaseJoined

    events: list[Event] = []
    with session.working("base add", events.append) as context:
        recorded = add_base_model(context, name, path, loader=loader, load_in=load_in)
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


@command
def alias(session: Session, name: NameArg, labels: LabelsArg, keep: KeepOpt = None, remove: RemoveOpt = False) -> None:
    """Treat other names as the same base model.

    A label may be a mirror, a local copy or a revision. Tasks of all labels share one generator, and existing codes
    stay valid. If only one of the models has a generator, all tasks use it; run `icm train --update` to encode the
    other tasks. If several have one, select it with --keep. The others become earlier versions.

    With --remove, tasks whose adapters name LABEL are separated from NAME and lose their codes, vectors and
    measurements. If no task remains under NAME, they keep everything, and the generator moves with them.


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
        session.out.line(f"{joined.name} already has these labels")
        return
    moved = f" with {counted(joined.tasks, 'task')}" if joined.tasks else ""
    session.out.line(f"joined {', '.join(joined.labels)} to {joined.name}{moved}")
    if joined.without_code:
        session.out.note(f"{counted(len(joined.without_code), 'task')} without a code under the current generator")
    if joined.tasks:
        session.out.hint("run `icm train --update` to encode tasks without a code")


def _separate(session: Session, name: str, labels: list[str]) -> None:
    from icmlora.fleet.bases.base_models import separate_labels

    separated = separate_labels(session.context, name, labels)
    session.out.document([asdict(entry) for entry in separated])
    for entry in separated:
        lost = f"; deleted {counted(entry.codes, 'code')}" if entry.codes else ""
        session.out.line(f"separated {entry.label} with {counted(entry.tasks, 'task')}{lost}")


@command
def ls(session: Session) -> None:
    """List base models with their aliases and locations.

    Example:
      icm base ls
    """
    from icmlora.fleet.bases.base_models import list_base_models

    bases = list_base_models(session.context)
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
    from icmlora.base_models.finding.mirrors import original_of

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


@command
def rm(session: Session, name: NameArg) -> None:
    """Forget the location of a base model. Its adapters and files are kept.

    Example:
      icm base rm HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from icmlora.fleet.bases.base_models import forget_base_model

    forget_base_model(session.context, name)
    session.out.document({"name": name, "path": None})
    session.out.line(f"forgot the location of {name}")


base = typer.Typer(name="base", help="List base models and set their locations and aliases.", no_args_is_help=True)
base.command()(add)
base.command()(alias)
base.command()(ls)
base.command()(rm)
