"""`icm duplicates`: find tasks whose adapters are the same, or nearly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.options import BaseModelOpt, SomeTasksArg
from icm_cli.output import Column
from icm_cli.session import Session, command
from icm_cli.text import as_fields
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.fleet.tasks.duplicates import DuplicatePair, DuplicatesReport

MaxDistanceOpt = Annotated[
    float,
    typer.Option(
        "--max-distance",
        metavar="X",
        min=0.0,
        max=0.5,
        help="Largest distance of near copies; 0 finds only exact ones.",
    ),
]

_COLUMNS = (Column("task", shrink=True), Column(""), Column("like", shrink=True), Column("distance", right=True))
_NOTED = (*_COLUMNS, Column(""))


@command
def duplicates(
    session: Session,
    tasks: SomeTasksArg = None,
    max_distance: MaxDistanceOpt = 0.1,
    base_model: BaseModelOpt = None,
) -> None:
    """Find tasks whose adapters are the same, or nearly; nothing is changed or removed.

    `=` marks equal tensors and scale, whatever else the files say. `~` marks near copies; DISTANCE is that of dW,
    ||dW - dW'|| / max(||dW||, ||dW'||). Rank, type and format do not matter. Near copies are looked for among tasks
    of one base model. Each task is listed with the oldest one of its group or, if that is too far, with the nearest
    task linking it to the group. With TASKS, only near copies of these are shown. --quiet prints one group per line,
    the oldest task first.

    Example:
      icm duplicates
      icm duplicates dog-v2 --max-distance 0.3
    """
    from icmlora.fleet.tasks.duplicates import find_duplicates

    with session.working("duplicates") as context:
        found = find_duplicates(context, tasks or (), max_distance=max_distance, base_model=base_model)
    out = session.out
    out.document(_as_json(found))
    if out.is_quiet:
        for group in found.groups:
            out.answer(" ".join(group.tasks))
    _print(session, found)


def _print(session: Session, found: DuplicatesReport) -> None:
    out, pairs = session.out, [pair for group in found.groups for pair in group.pairs]
    notes = {pair.task: _note(pair) for pair in pairs} | {pair.task: _OTHER_BASE for pair in found.other_bases}
    pairs += found.other_bases
    columns = _NOTED if any(notes.values()) else _COLUMNS
    out.table(columns, [[*_cells(pair), notes[pair.task]][: len(columns)] for pair in pairs])
    compared = counted(found.compared, "task")
    if pairs:
        out.line()
        groups = f" in {counted(len(found.groups), 'group')}" if found.groups else ""
        out.line(f"compared {compared}: {counted(len(pairs), 'copy', 'copies')}{groups}")
        out.hint("`icm rm NAME` removes a task")
    else:
        out.line(f"compared {compared}: no duplicates")
    if found.from_codes:
        out.note(f"evicted, so compared as what the code decodes to: {some(found.from_codes)}")
    if found.tensors_only:
        out.note(f"only equal tensors were looked for, because there can be no code: {some(found.tensors_only)}")
    for entry in found.left_out:
        out.warn(f"{entry.task} was not compared: {entry.reason}", kind="not_compared", task=entry.task)


def _cells(pair: DuplicatePair) -> list[str]:
    if pair.same_tensors:
        return [pair.task, "=", pair.like, "same tensors"]
    return [pair.task, "~", pair.like, f"{pair.distance:.4f}"]


_OTHER_BASE = "another base model"


def _note(pair: DuplicatePair) -> str:
    return "other heads or biases" if pair.extras_differ else ""


def _as_json(found: DuplicatesReport) -> dict[str, object]:
    return {
        "max_distance": found.max_distance,
        "compared_count": found.compared,
        "groups": [
            {
                "base_model": group.base_model,
                "tasks": list(group.tasks),
                "pairs": [as_fields(pair) for pair in group.pairs],
            }
            for group in found.groups
        ],
        "other_bases": [as_fields(pair) for pair in found.other_bases],
        "from_codes": found.from_codes,
        "tensors_only": found.tensors_only,
        "left_out": [{"task": entry.task, "reason": entry.reason} for entry in found.left_out],
    }
