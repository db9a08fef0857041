"""`icm report`: write an HTML report about the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from icm_cli.command import plain_command as command
from icm_cli.errors import ExitCode
from icm_cli.options import DeviceOpt, option
from icm_cli.report import print_event, print_skipped
from icm_cli.session import Session
from icm_cli.text import groups_json
from icmlora.io.text import counted, human_size

if TYPE_CHECKING:
    from icmlora.fleet.report.pictures import Distances, TaskPictures
    from icmlora.fleet.report.report import ReportSummary

FileOpt = Annotated[Path, option("--output -o FILE", "HTML file to write.")]
OutputsOpt = Annotated[
    list[str] | None,
    option(
        "--outputs TASK",
        "Also show outputs of the base model, original and code for this task. Repeatable.",
        completes="task",
    ),
]
PromptsOpt = Annotated[
    Path | None,
    option(
        "--prompts FILE",
        "Prompts for --outputs: one per line, or JSON lines with prompt, text or messages. Default: the beginnings of "
        "three held-out texts of the task or, for an image task, the trigger words and tags in its file.",
    ),
]
TokensOpt = Annotated[int, option("--max-new-tokens N", "Maximum number of tokens to generate for each prompt.", min=1)]
StepsOpt = Annotated[int, option("--steps N", "Denoising steps for each picture.", min=1)]
SeedsOpt = Annotated[int, option("--seeds N", "Pictures for each prompt.", min=1)]
SizeOpt = Annotated[
    int | None,
    option("--image-size N", "Width and height of pictures in pixels. Default: the pipeline's own size.", min=1),
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
    """Write an HTML report about the store.

    The report is a single file that works offline: the figures of `icm stats`, a searchable table of all tasks, the map
    of `icm map` and a chart of size against quality.

    --outputs compares text generated with greedy decoding by the base model alone, with the original and with the code,
    and marks the differences. For an image task it compares pictures from the diffusers pipeline set with
    `icm base add`. Only --outputs needs the base model. If some outputs are missing, the exit code is 3.

    Example:
      icm report -o fleet.html
      icm report -o fleet.html --outputs watercolour --prompts prompts.txt --steps 30
    """
    from icmlora.fleet.report.report import write_report

    with session.working("report", lambda event: print_event(session, event)) as context:
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
    if not _print_result(session, done):
        raise typer.Exit(ExitCode.PARTLY)


def _print_result(session: Session, done: ReportSummary) -> bool:
    """Print the result. Return whether the report is complete."""
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
    out.line(f"wrote {done.file}: {counted(done.tasks, 'task')}, {human_size(done.size)}")
    for found in done.pictures:
        if found.distances is not None:
            out.line(f"{found.task}, image distance: {_distances_text(found.distances)}")
    for group in done.skipped:
        print_skipped(session, group, "no outputs")
    return not (done.failed or done.skipped)


def _distances_text(distances: Distances) -> str:
    parts = [f"{source} to original {distance:.3f}" for source, distance in distances.to_original.items()]
    return ", ".join(parts if distances.seeds is None else [*parts, f"between seeds {distances.seeds:.3f}"])


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
