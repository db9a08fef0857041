"""The options of `icm train`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from icm_cli.options import gain_option, loss_option, quality_option, refine_option
from icmlora.training.config import (
    DEFAULT_QUALITY,
    FREE_STEPS,
    LEAST_SMALL_STEPS,
    LEAST_STACKED_STEPS,
    LEAST_STEPS,
    MOST_STEPS,
    PARAMETERS_PER_STEP,
    RATE,
    REFINE_STEPS,
    SMALL_FLEET,
    SMALL_RATE,
    SMALL_STEPS_PER_TASK,
    STACKED,
    STEPS_PER_ADAPTER,
)

MODEL_PANEL = "Model"

QualityOpt = Annotated[
    int | None,
    quality_option(
        f"Default: {DEFAULT_QUALITY}, or whatever the current generator uses. In our "
        "measurements 4 keeps 97 % of the gain, and 6 keeps 98 % with four times the bytes."
    ),
]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed for all random numbers.")]
ResumeOpt = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume an interrupted training.")]
FreshOpt = Annotated[bool, typer.Option("--fresh", help="Start from scratch instead of from the current generator.")]
UpdateOpt = Annotated[
    bool,
    typer.Option("--update", help="Only encode tasks that have no code yet. Other tasks do not change."),
]
RefineOpt = Annotated[
    int | None,
    refine_option(
        "Then fit each code to what its adapter does, in this many steps, if the base model is on this machine: "
        f"codes become several times smaller. 0: do not refine. Default: {REFINE_STEPS}."
    ),
]
EvalOpt = Annotated[
    bool,
    typer.Option("--eval/--no-eval", help="Afterwards, measure the codes if the base model is on this machine."),
]
ErrorOpt = Annotated[
    float | None,
    loss_option(
        "--max-error", "Then re-encode to keep this relative error, ||dW' - dW|| / ||dW||, as `icm encode` does."
    ),
]
GainOpt = Annotated[
    float | None,
    gain_option("Then re-encode to keep this retained gain, as `icm encode` does. Needs the base model."),
]
ToleranceOpt = Annotated[
    float | None,
    loss_option(
        "--tolerance",
        "Largest squared error, weighted by how sensitive each channel is. Default: set by --quality. Most people want "
        "--max-error.",
        MODEL_PANEL,
    ),
]
WidthOpt = Annotated[
    int | None,
    typer.Option(
        "--width",
        metavar="N",
        min=4,
        max=4096,
        help="Hidden width of a new generator's decoder. Default: depends on the number of tasks.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]
StepsOpt = Annotated[
    int | None,
    typer.Option(
        "--steps",
        metavar="N",
        min=1,
        help=f"Adapters to draw; a step sees one, on a card {STACKED}. Default: {SMALL_STEPS_PER_TASK} per task, at "
        f"least {LEAST_SMALL_STEPS}; from {SMALL_FLEET} tasks on {STEPS_PER_ADAPTER} per adapter, {LEAST_STEPS:,} to "
        f"{MOST_STEPS:,}, but beyond {FREE_STEPS} at most one per {PARAMETERS_PER_STEP:,} parameters. A card makes at "
        f"least {LEAST_STACKED_STEPS}.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]
RateOpt = Annotated[
    float | None,
    typer.Option(
        "--lr",
        metavar="X",
        min=1e-6,
        max=1.0,
        help=f"Peak learning rate. Default: {RATE:g}; {SMALL_RATE:g} for fewer than {SMALL_FLEET} tasks without "
        "--steps.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]


class ObjectiveName(StrEnum):
    """What to train."""

    BITS = "bits"
    FUNCTIONAL = "functional"
    BOTH = "both"


ObjectiveOpt = Annotated[
    ObjectiveName,
    typer.Option(
        "--objective",
        help="bits: train the generator and encode the tasks. functional: train the few-shot start that `icm generate` "
        "needs; codes do not change. both: one after the other.",
    ),
]
EpisodesOpt = Annotated[
    int,
    typer.Option(
        "--episodes",
        metavar="N",
        min=1,
        help="Episodes of training for the few-shot start.",
        rich_help_panel=MODEL_PANEL,
    ),
]
