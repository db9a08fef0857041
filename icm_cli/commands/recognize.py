"""`icm recognize`: say which known task some samples belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from icm_cli.options import BaseModelOpt, DeviceOpt, LoaderOpt, option
from icm_cli.output import Column
from icm_cli.session import Session, command
from icmlora.io.text import counted

SamplesOpt = Annotated[
    Path,
    option(
        "--samples FILE", "Samples as JSON lines, as for `icm generate`. icm reads 32 of them, spread over the file."
    ),
]
BundleOpt = Annotated[
    Path | None,
    option(
        "--bundle --from FILE",
        "Compare with the tasks of this bundle instead of the store; --base-model then says where the base "
        "model is, and --loader what loads it.",
    ),
]
LimitOpt = Annotated[int, option("--limit N", "Show at most N tasks.", min=1)]

_COLUMNS = (Column("task", shrink=True), Column("probability", right=True), Column("distance", right=True))
_NONE = "none of them"


@command
def recognize(
    session: Session,
    samples: SamplesOpt,
    limit: LimitOpt = 5,
    base_model: BaseModelOpt = None,
    bundle: BundleOpt = None,
    loader: LoaderOpt = None,
    device: DeviceOpt = None,
) -> None:
    """Say which known task some samples belong to, and how probable that is.

    icm reads the samples with the base model alone and compares their task vector with those of all known tasks.
    `none of them` means that the task is new. What counts as near follows from the stored support sets. With --quiet,
    only the name of the task is printed, and nothing if the task is new.

    Example:
      icm recognize --samples queries.jsonl
    """
    from icm_cli.recognized import recognized

    found = recognized(session, samples, base_model, bundle, loader, device)
    out = session.out
    out.document(
        {
            "task": found.task,
            "base_model": found.base_model,
            "samples_count": found.samples,
            "new": found.new,
            "candidates": [
                {"task": one.task, "probability": one.probability, "distance": one.distance}
                for one in found.candidates[:limit]
            ],
            "left_out": [{"task": entry.task, "reason": entry.reason} for entry in found.left_out],
        }
    )
    best = found.candidates[0]
    if out.is_quiet:
        if found.task is not None:
            out.answer(found.task)
        return
    out.line(f"{_NONE}, {found.new:.2f}" if found.task is None else f"{best.task}, {best.probability:.2f}")
    out.line()
    rows = [(one.probability, one.task, f"{one.distance:.3f}") for one in found.candidates[:limit]]
    rows = sorted([*rows, (found.new, _NONE, "-")], key=lambda row: -row[0])
    out.table(_COLUMNS, [[name, f"{probability:.2f}", distance] for probability, name, distance in rows])
    if found.left_out:
        out.note(f"{counted(len(found.left_out), 'task')} cannot be compared; --json says why")
    for entry in found.left_out:
        if entry.is_damaged:
            out.warn(f"{entry.task}: {entry.reason}", task=entry.task)
    if found.task is None:
        out.hint("`icm generate NAME` makes an adapter for a new task")
