"""`icm report`: write the store as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.errors import ExitCode
from icm_cli.failures import print_failure, skipped_text
from icm_cli.options import DeviceOpt, option
from icm_cli.session import Session, command
from icm_cli.text import groups_json
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.report.pictures import Distances, TaskPictures
    from icmlora.fleet.report.report import ReportSummary

FileOpt = Annotated[Path, option("--output -o FILE", "The page to write.")]
OutputsOpt = Annotated[
    list[str] | None,
    option(
        "--outputs TASK",
        "Also show what base model, original and code of this task write or draw. Repeat it for more tasks.",
        completes="task",
    ),
]
PromptsOpt = Annotated[
    Path | None,
    option(
        "--prompts FILE",
        "Prompts for --outputs: one a line, or JSON lines with prompt, text or messages. Default: the beginnings "
        "of three of the task's own held-out texts; for an image task, the trigger words and tags that its file notes.",
    ),
]
TokensOpt = Annotated[int, option("--max-new-tokens N", "Tokens to write for each prompt, at most.", min=1)]
StepsOpt = Annotated[int, option("--steps N", "Steps of denoising for each picture.", min=1)]
SeedsOpt = Annotated[int, option("--seeds N", "Pictures of each prompt.", min=1)]
SizeOpt = Annotated[
    int | None,
    option("--image-size N", "Width and height of pictures in pixels. Default: what the pipeline draws.", min=1),
]
ReplaceOpt = Annotated[bool, option("--force -f", "Replace FILE if it exists.")]


@command
def report(
    session: Session,
    output: FileOpt,
    outputs: OutputsOpt = None,
    prompts: PromptsOpt = None,
    max_new_tokens: TokensOpt = 40,
    steps: StepsOpt = 20,
    seeds: SeedsOpt = 2,
    image_size: SizeOpt = None,
    device: DeviceOpt = None,
    force: ReplaceOpt = False,
) -> None:
    """Write the store as one HTML page to look at, to print or to send: it needs no network and no server.

    The page has the bill of `icm stats`, a table of all tasks to sort and search, the map of `icm map` where tasks have
    vectors, and a picture of bytes against quality. With --outputs it also shows what the base model writes alone, with
    the original and with the code of a task, always the most probable next token, and marks where the last two differ.
    An image task draws instead, with the diffusers pipeline that `icm base add` names; the page says how far the
    pictures of code and original are apart, and those of two seeds. Only outputs need the base model; a task without
    outputs is named, and the exit code is then 3. The same store and options give the same bytes.

    Example:
      icm report -o fleet.html
      icm report -o fleet.html --outputs watercolour --prompts prompts.txt --steps 30
    """
    from icmlora.fleet.report.report import write_report

    with session.working("report", lambda event: print_failure(session, event)) as context:
        done = write_report(
            context,
            output,
            outputs=outputs or (),
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            steps=steps,
            seeds=seeds,
            image_size=image_size,
            device=session.device(device),
            force=force,
        )
    if not _tell(session, done):
        raise typer.Exit(ExitCode.PARTLY)


def _tell(session: Session, done: ReportSummary) -> bool:
    """Print what was written, and return whether nothing is missing."""
    out = session.out
    out.document(
        {
            "output": str(done.file),
            "size": done.size,
            "tasks_count": done.tasks,
            "maps": done.maps,
            "quality": done.quality,
            "outputs": done.outputs,
            "pictures": [_pictures_json(found) for found in done.pictures],
            "failed": [{"task": task, "reason": reason} for task, reason in done.failures.items()],
        }
    )
    out.names([str(done.file)])
    out.line(f"{done.file}: {counted(done.tasks, 'task')}; {human_size(done.size)}")
    for found in done.pictures:
        if found.distances is not None:
            out.line(f"{found.task}: {_distances_text(found.distances)}")
    for base in done.left_out:
        text = skipped_text(base, "no outputs")
        out.warn(text, kind="base_model_left_out", base_model=base.base_model, tasks=list(base.tasks), hint=base.hint)
        if base.hint is not None:
            out.hint(base.hint)
    return not (done.failed or done.left_out)


def _distances_text(distances: Distances) -> str:
    parts = [f"{source} to original {distance:.3f}" for source, distance in distances.to_original.items()]
    return ", ".join(parts if distances.seeds is None else [*parts, f"two seeds {distances.seeds:.3f}"])


def _pictures_json(found: TaskPictures) -> dict[str, object]:
    distances = found.distances
    return {
        "task": found.task,
        "sources": list(found.sources),
        "prompts": [drawn.prompt for drawn in found.prompts],
        "to_original": None if distances is None else dict(distances.to_original),
        "between_seeds": None if distances is None else distances.seeds,
        "errors": groups_json(found.errors),
        "notes": list(found.notes),
    }
