"""`icm duplicates`: find tasks with equal or similar adapters."""

from __future__ import annotations

from icm_cli.command import Call, command
from icm_cli.output import Field
from icm_cli.session import Session
from icm_cli.text import as_fields, figure
from icmlora.fleet.tasks.duplicate_pairs import DuplicatePair, DuplicatesReport
from icmlora.fleet.tasks.duplicates import find_duplicates
from icmlora.io.text import counted, some

_FIELDS: tuple[Field[DuplicatePair], ...] = (
    Field("task", lambda pair: pair.task, shrink=True),
    Field("", lambda pair: "=" if pair.same_tensors else "~"),
    Field("like", lambda pair: pair.like, shrink=True),
    Field("distance", lambda pair: "same tensors" if pair.same_tensors else figure(pair.distance), right=True),
)


@command(find_duplicates)
def duplicates(session: Session, call: Call[DuplicatesReport]) -> None:
    found, out = call.run(label="duplicates"), session.out
    names = ("other_bases", "from_codes", "tensors_only")
    fields = as_fields(found)
    out.document(
        {
            "max_distance": found.max_distance,
            "compared_count": found.compared,
            "groups": fields["groups"],
            **{name: fields[name] for name in names},
            "left_out": [{"task": entry.task, "reason": entry.reason} for entry in found.left_out],
        }
    )
    out.names(" ".join(group.tasks) for group in found.groups)
    pairs = [pair for group in found.groups for pair in group.pairs]
    notes = {pair.task: "other heads or biases" if pair.extras_differ else "" for pair in pairs}
    notes |= {pair.task: "another base model" for pair in found.other_bases}
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
