"""`icm duplicates`: find tasks whose adapters are the same, or nearly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.options import BaseModelOpt, SomeTasksArg, option
from icm_cli.output import Field
from icm_cli.session import Session, command
from icm_cli.text import as_fields, figure
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.fleet.tasks.duplicates import DuplicatePair, DuplicatesReport

MaxDistanceOpt = Annotated[
    float, option("--max-distance X", "Largest distance of near copies; 0 finds only exact ones.", min=0.0, max=0.5)
]

_FIELDS: tuple[Field[DuplicatePair], ...] = (
    Field("task", lambda pair: pair.task, shrink=True),
    Field("", lambda pair: "=" if pair.same_tensors else "~"),
    Field("like", lambda pair: pair.like, shrink=True),
    Field("distance", lambda pair: "same tensors" if pair.same_tensors else figure(pair.distance), right=True),
)


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
    out.names(" ".join(group.tasks) for group in found.groups)
    _print(session, found)


def _print(session: Session, found: DuplicatesReport) -> None:
    out, pairs = session.out, [pair for group in found.groups for pair in group.pairs]
    notes = {pair.task: _note(pair) for pair in pairs} | {pair.task: _OTHER_BASE for pair in found.other_bases}
    pairs += found.other_bases
    out.listing([*_FIELDS, Field("", lambda pair: notes[pair.task], is_rare=True)], pairs)
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
