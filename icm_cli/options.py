"""Options that several commands share, each written once.

The global ones are added to every command by `icm_cli.session.command`, so they are understood before and
after its name.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from icm_cli.completion import complete_base, complete_task

GLOBAL_PANEL = "Global options"

StoreOpt = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="FOLDER",
        help="Folder of the store. (env ICM_STORE, then config.toml, then $XDG_DATA_HOME/icm)",
        show_default=False,
        rich_help_panel=GLOBAL_PANEL,
    ),
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Answer in JSON: no progress, no questions.", rich_help_panel=GLOBAL_PANEL)
]
QuietOpt = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print the bare answer and errors only.", rich_help_panel=GLOBAL_PANEL)
]
VerboseOpt = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, help="Say more.", show_default=False, rich_help_panel=GLOBAL_PANEL, metavar=""
    ),
]
NoProgressOpt = Annotated[
    bool,
    typer.Option("--no-progress", help="Show no progress. (env ICM_NO_PROGRESS)", rich_help_panel=GLOBAL_PANEL),
]
LockTimeoutOpt = Annotated[
    float | None,
    typer.Option(
        "--lock-timeout",
        metavar="SECONDS",
        help="How long to wait for another icm: 30 if not set. (env ICM_LOCK_TIMEOUT)",
        show_default=False,
        rich_help_panel=GLOBAL_PANEL,
    ),
]

TaskArg = Annotated[
    str, typer.Argument(metavar="TASK", help="Name of a task, as `icm ls` lists it.", autocompletion=complete_task)
]
TasksArg = Annotated[
    list[str],
    typer.Argument(metavar="TASK...", help="Names of tasks, as `icm ls` lists them.", autocompletion=complete_task),
]
SomeTasksArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...",
        help="Names of tasks; all if none is given.",
        autocompletion=complete_task,
        show_default=False,
    ),
]
BaseModelOpt = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="Only what belongs to this base model.",
        autocompletion=complete_base,
        show_default=False,
    ),
]
FromOpt = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="FILE", help="A bundle that `icm export` wrote, instead of the store.", show_default=False
    ),
]
BundleArg = Annotated[
    Path, typer.Argument(metavar="FILE", help="A bundle, as `icm export` writes it.", show_default=False)
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", "-n", help="Say what would be done and do nothing.")]
YesOpt = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
ForceOpt = Annotated[bool, typer.Option("--force", "-f", help="Replace an output folder that is not empty.")]
SeedOpt = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of what is random.", show_default=False)]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Where to compute: auto if not set. (env ICM_DEVICE)",
        show_default=False,
    ),
]


def loss_option(name: str, text: str, panel: str | None = None) -> Any:
    """Return an option for a share of dW that a code may lose."""
    return typer.Option(name, metavar="X", min=1e-4, max=0.9, help=text, show_default=False, rich_help_panel=panel)


def gain_option(text: str) -> Any:
    """Return an option for the retained gain that a code has to keep."""
    return typer.Option("--min-gain", metavar="G", min=0.0, max=1.0, help=text, show_default=False)


class OnConflict(StrEnum):
    """What happens to a task whose name is taken by another adapter."""

    SKIP = "skip"
    REPLACE = "replace"
    FAIL = "fail"
