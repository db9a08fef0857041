"""Write an HTML report about a store: `icm report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from icmlora.errors import DataError
from icmlora.fleet.context import Context, use_case
from icmlora.fleet.params import Device, Param
from icmlora.fleet.report.summary import ReportSummary
from icmlora.io.staging import check_absent, writing_file


@use_case
def write_report(
    context: Context,
    file: Annotated[str | Path, Param("HTML file to write.", "--output -o FILE")],
    *,
    outputs: Annotated[
        Sequence[str],
        Param(
            "Also show outputs of the base model, original and code for this task. Repeatable.",
            "--outputs TASK",
            completes="task",
        ),
    ] = (),
    prompts: Annotated[
        str | Path | None,
        Param(
            "Prompts for --outputs: one per line, or JSON lines with prompt, text or messages. Default: the beginnings "
            "of three held-out texts of the task or, for an image task, the trigger words and tags in its file.",
            "--prompts FILE",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, Param("Maximum number of tokens to generate for each prompt.", "--max-new-tokens N", min=1)
    ] = 40,
    steps: Annotated[int, Param("Denoising steps for each picture.", "--steps N", min=1)] = 20,
    seeds: Annotated[int, Param("Pictures for each prompt.", "--seeds N", min=1)] = 2,
    image_size: Annotated[
        int | None,
        Param("Width and height of pictures in pixels. Default: the pipeline's own size.", "--image-size N", min=1),
    ] = None,
    device: Device = "auto",
    force: Annotated[bool, Param("Replace FILE if it exists.", "--force -f")] = False,
) -> ReportSummary:
    """Write an HTML report about the store.

    The report is a single file that works offline: the figures of `icm stats`, a searchable table of all tasks, the map
    of `icm map` and a chart of size against quality.

    --outputs compares text generated with greedy decoding by the base model alone, with the original and with the code,
    and marks the differences. For an image task it compares pictures from the diffusers pipeline set with
    `icm base add`. Only --outputs needs the base model. If some outputs are missing, the exit code is 3.

    Example:
      icm report -o fleet.html
      icm report -o fleet.html --outputs watercolour --prompts prompts.txt --steps 30

    Raises:
        OutputExists: The file exists and `force` is not given.
        DataError: The prompts cannot be used, or the only chosen task has no outputs.
        BaseModelNotFound: None of the base models of the chosen tasks is on this machine.
    """
    from icmlora.fleet.report.content import make_outputs, page_of  # imports numpy, as the next one does
    from icmlora.fleet.report.page import render

    page_file, prompts_file = Path(file), None if prompts is None else Path(prompts)
    check_absent(page_file, force=force)
    if prompts_file is not None and not outputs:
        raise DataError("--prompts needs --outputs", hint="choose tasks with --outputs")
    report = ReportSummary(file=page_file)
    with context.open(read_only=True) as store:
        chosen = list({task.name: task for task in map(store.task, outputs)}.values())
        drawing = steps, seeds, image_size
        made = []
        if chosen:
            made = make_outputs(context, store, chosen, report, prompts_file, max_new_tokens, drawing, device)
        page = page_of(store, made, report.failures)
    report.tasks, report.outputs = len(page.table.rows), [found.task for found in made]
    report.maps = [found.base_model for found in page.maps if found.svg is not None]
    report.quality = None if page.rate is None else page.rate.quality
    with writing_file(page_file, force=force) as stream:
        for piece in render(page):
            report.size += stream.write(piece)
    return report
