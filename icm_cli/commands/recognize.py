"""`icm recognize`: find the stored task that matches some samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from icm_cli.command import plain_command as command
from icm_cli.config import cache_folder
from icm_cli.errors import UsageProblem
from icm_cli.output import Column
from icm_cli.session import Session
from icmlora.fleet.params import BaseModelName, Device, Limit, Loader, Param
from icmlora.fleet.tasks.described import find_described
from icmlora.io.text import counted

SamplesOpt = Annotated[
    Path | None,
    Param("Samples as JSON lines, as for `icm generate`. Uses 32 of them, spread over the file.", "--samples FILE"),
]
DescriptionOpt = Annotated[
    str | None,
    Param("Instead of samples: rank tasks by words in their names, notes, tags and cards.", "--description TEXT"),
]
BundleOpt = Annotated[
    Path | None,
    Param(
        "Compare with the tasks of this bundle instead of the store. --base-model is then the path of the base model, "
        "and --loader the function that loads it.",
        "--bundle --from FILE",
    ),
]

_COLUMNS = (Column("task", shrink=True), Column("probability", right=True), Column("distance", right=True))
_DESCRIBED = (Column("task", shrink=True), Column("score", right=True))
_NONE = "none of them"


@command
def recognize(
    session: Session,
    samples: SamplesOpt = None,
    description: DescriptionOpt = None,
    limit: Limit = 5,
    base_model: BaseModelName = None,
    bundle: BundleOpt = None,
    loader: Loader = None,
    device: Device = "auto",
) -> None:
    """Find the stored task that matches some samples.

    Computes the task vector of the samples with the base model, compares it with the vectors of all stored tasks and
    prints the probability of each. `none of them` means that the task is new. With --quiet, prints only the name of
    the task, or nothing if it is new.

    --description needs no base model, but cannot detect a new task.

    Example:
      icm recognize --samples queries.jsonl
      icm recognize --description "verses of the bible"
    """
    if (samples is None) == (description is None):
        raise UsageProblem("recognition needs samples or a description", hint="use either --samples or --description")
    if samples is None:
        if bundle is not None:
            raise UsageProblem("--description works only with a store", hint="remove --from, or use --samples")
        _print_described(session, str(description), base_model, limit)
        return
    from icmlora.fleet.vectors.recognize import recognize as use_case

    out = session.out
    if bundle is not None:
        from icmlora.fleet.bundles.bundles import Bundle

        opened = Bundle(bundle, cache=cache_folder)
        found = use_case(opened, samples, base_model=base_model, loader=loader, device=device)
    else:
        with session.working("recognize") as context:
            found = use_case(context, samples, base_model=base_model, loader=loader, device=device)
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
        out.note(f"skipped {counted(len(found.left_out), 'task')}; --json lists the reasons")
    for entry in found.left_out:
        if entry.is_damaged:
            out.warn(f"{entry.task}: {entry.reason}", task=entry.task)
    if found.task is None:
        out.hint("run `icm generate NAME` to create an adapter for a new task")


def _print_described(session: Session, description: str, base_model: str | None, limit: int | None) -> None:

    found, out = find_described(session.context, description, base_model=base_model, limit=limit), session.out
    out.document({"candidates": [{"task": one.task, "score": one.score} for one in found]})
    out.names(one.task for one in found[:1])
    out.table(_DESCRIBED, [[one.task, f"{one.score:.2f}"] for one in found])
    if not found:
        out.note("found none of these words in a task's name, note, tags or card, or found them in all tasks")
