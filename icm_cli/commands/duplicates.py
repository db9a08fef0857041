"""`icm duplicates`: find tasks with equal or similar adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from icm_cli.command import plain_command as command
from icm_cli.options import BaseModelOpt, SomeTasksArg, option
from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import as_fields, figure
from icmlora.io.text import counted, some

if TYPE_CHECKING:
    from icmlora.fleet.tasks.duplicates import DuplicatePair, DuplicatesReport

MaxDistanceOpt = Annotated[
    float, option("--max-distance X", "Largest distance of a near copy. 0 finds only equal adapters.", min=0.0, max=0.5)
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
    """Find tasks with equal or similar adapters.

    `=` marks equal tensors and scale. `~` marks near copies within DISTANCE, ||dW - dW'|| / max(||dW||, ||dW'||),
    among tasks of one base model, regardless of rank, type and format. Each task is compared with the oldest of its
    group, or with the nearest if the oldest is too far. With TASKS, only groups with these tasks are shown. Nothing is
    changed. --quiet prints one group per line.

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
        same = sum(pair.same_tensors for pair in pairs)
        counts = [(same, "equal adapter", "equal adapters"), (len(pairs) - same, "near copy", "near copies")]
        listed = ", ".join(counted(number, one, several) for number, one, several in counts if number)
        out.line(f"compared {compared}: {listed}{groups}")
        if any(pair.same_tensors and not pair.extras_differ for pair in pairs):
            out.hint("run `icm rm NAME` to remove a task with an equal adapter")
    else:
        out.line(f"compared {compared}: no duplicates")
    if found.from_codes:
        out.note(f"compared evicted tasks by their codes: {some(found.from_codes)}")
    if found.tensors_only:
        out.note(f"compared only for equal tensors, because they cannot have a code: {some(found.tensors_only)}")
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
