"""The options of `icm train`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from icm_cli.options import gain_option, loss_option

MODEL_PANEL = "Model"

QualityOpt = Annotated[
    int | None,
    typer.Option(
        "--quality",
        metavar="1..8",
        min=1,
        max=8,
        help="The one dial: 1 is smallest, 8 most faithful; else the present generator's, at first 4.",
        show_default=False,
    ),
]
SeedOpt = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is random.")]
ResumeOpt = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a run that was stopped.")]
FreshOpt = Annotated[bool, typer.Option("--fresh", help="Start anew, not from the present generator.")]
UpdateOpt = Annotated[
    bool,
    typer.Option(
        "--update", help="Only give tasks without a code one; nothing else is read or changed, originals may be gone."
    ),
]
EvalOpt = Annotated[
    bool, typer.Option("--eval/--no-eval", help="Then measure what the codes kept, where the base model is found.")
]
ErrorOpt = Annotated[
    float | None,
    loss_option("--max-error", "Relative dW error that a code may have; then tasks are encoded as by `icm encode`."),
]
GainOpt = Annotated[
    float | None,
    gain_option("Smallest retained gain that a code may have, likewise; needs the base model and held-out text."),
]
ToleranceOpt = Annotated[
    float | None,
    loss_option(
        "--tolerance",
        "Share of dW's energy, weighted by sensitivity, that a code may lose; else the quality's.",
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
        help="Hidden width of a new generator's decoder; else that of the fleet's size.",
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
        help="Optimiser steps; else 10 per adapter, from 1,000 to 20,000.",
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
        help="Peak learning rate; else 0.004.",
        show_default=False,
        rich_help_panel=MODEL_PANEL,
    ),
]


class ObjectiveName(StrEnum):
    """What training is for."""

    BITS = "bits"
    FUNCTIONAL = "functional"
    BOTH = "both"


ObjectiveOpt = Annotated[
    ObjectiveName,
    typer.Option(
        "--objective",
        help="bits: the generator and its codes. functional: where unseen tasks start, for `icm generate`; needs the "
        "base model, and leaves generator and codes as they are. both: one after the other.",
    ),
]
EpisodesOpt = Annotated[
    int,
    typer.Option(
        "--episodes", metavar="N", min=1, help="Episodes of the functional objective.", rich_help_panel=MODEL_PANEL
    ),
]
