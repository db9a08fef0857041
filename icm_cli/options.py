"""Options that several commands share, each written once.

`icm_cli.session.command` adds the global ones to every command, so they work before and after its name.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from icm_cli.config import DEFAULT_LOCK_TIMEOUT

GLOBAL_PANEL = "Global options"


def completing(what: Literal["task", "base", "tag", "filter", "sort", "format"]) -> Callable[[str], list[str]]:
    """Return a function by which a shell completes an argument."""

    def answer(incomplete: str) -> list[str]:
        from icm_cli import completion  # a shell asks, a command does not

        return cast(list[str], getattr(completion, f"complete_{what}")(incomplete))

    return answer


StoreOpt = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="FOLDER",
        help="Store folder. Default: $ICM_STORE, then config.toml, then $XDG_DATA_HOME/icm.",
        show_default=False,
        rich_help_panel=GLOBAL_PANEL,
    ),
]
JsonOpt = Annotated[
    bool, typer.Option("--json", help="Print JSON, without progress or questions.", rich_help_panel=GLOBAL_PANEL)
]
QuietOpt = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only the bare answer and errors.", rich_help_panel=GLOBAL_PANEL)
]
VerboseOpt = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="Print more details.",
        show_default=False,
        rich_help_panel=GLOBAL_PANEL,
        metavar="",
    ),
]
NoProgressOpt = Annotated[
    bool,
    typer.Option("--no-progress", help="Show no progress. (env: ICM_NO_PROGRESS)", rich_help_panel=GLOBAL_PANEL),
]
LockTimeoutOpt = Annotated[
    float | None,
    typer.Option(
        "--lock-timeout",
        metavar="SECONDS",
        help=f"How long to wait for other icm processes, in all. Default: {DEFAULT_LOCK_TIMEOUT:g}. "
        "(env: ICM_LOCK_TIMEOUT)",
        show_default=False,
        rich_help_panel=GLOBAL_PANEL,
    ),
]

TaskArg = Annotated[
    str, typer.Argument(metavar="TASK", help="Name of a task (see `icm ls`).", autocompletion=completing("task"))
]
TasksArg = Annotated[
    list[str],
    typer.Argument(metavar="TASK...", help="Names of tasks (see `icm ls`).", autocompletion=completing("task")),
]
SomeTasksArg = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...",
        help="Names of tasks. Default: all tasks.",
        autocompletion=completing("task"),
        show_default=False,
    ),
]
BaseModelOpt = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="Only tasks of this base model.",
        autocompletion=completing("base"),
        show_default=False,
    ),
]
LoaderOpt = Annotated[
    str | None,
    typer.Option(
        "--loader",
        metavar="MODULE:FUNCTION",
        help="Your function that loads the base model; the path need then not be a transformers model.",
        show_default=False,
    ),
]
FiltersOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        "-F",
        metavar="FIELD=VALUE",
        help="Only tasks that pass, as 'rank>=8', 'tag=prod', 'base~llama'. Repeat it: all must hold.",
        autocompletion=completing("filter"),
        show_default=False,
    ),
]
SortOpt = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="FIELD[:desc]",
        help="Sort by a field, as 'size:desc'. Default: name.",
        autocompletion=completing("sort"),
        show_default=False,
    ),
]
LimitOpt = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", min=1, help="Show at most N tasks.", show_default=False),
]
FromOpt = Annotated[
    Path | None,
    typer.Option("--from", metavar="FILE", help="Read this bundle instead of the store.", show_default=False),
]
ServedBaseOpt = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="The base model that the engine runs, if icm does not find out or there are several.",
        autocompletion=completing("base"),
        show_default=False,
    ),
]
GatewayOpt = Annotated[
    bool,
    typer.Option("--gateway", help="With --print-config vllm: put `icm serve` in front instead of using the plug-in."),
]
BundleArg = Annotated[
    Path, typer.Argument(metavar="FILE", help="A bundle written by `icm export`.", show_default=False)
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", "-n", help="Print what would be done, but do nothing.")]
YesOpt = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
ForceOpt = Annotated[bool, typer.Option("--force", "-f", help="Replace an output folder that is not empty.")]
SeedOpt = Annotated[int | None, typer.Option("--seed", metavar="N", help="Random seed.", show_default=False)]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Device to compute on. Default: auto. (env: ICM_DEVICE)",
        show_default=False,
    ),
]

WorkersOpt = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|ray://HOST:PORT",
        help="Compute in N processes on this machine, or on a Ray cluster. Needs Ray. Default: in this process.",
        show_default=False,
    ),
]
ShardOpt = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only part I of N of the tasks, as 1/8. Several parts may run at the same time, on many machines.",
        show_default=False,
    ),
]


def loss_option(name: str, text: str, panel: str | None = None) -> Any:
    """Return an option for an upper limit on an error."""
    return typer.Option(name, metavar="X", min=1e-4, max=0.9, help=text, show_default=False, rich_help_panel=panel)


def gain_option(text: str) -> Any:
    """Return an option for a lower limit on the retained gain."""
    return typer.Option("--min-gain", metavar="G", min=0.0, max=1.0, help=text, show_default=False)


def quality_option(text: str) -> Any:
    """Return an option for the quality of codes."""
    help_text = f"1 (smallest) to 8 (most accurate). {text}"
    return typer.Option("--quality", metavar="1..8", min=1, max=8, help=help_text, show_default=False)


def refine_option(text: str) -> Any:
    """Return an option for the number of steps that refine codes."""
    return typer.Option("--refine", metavar="STEPS", min=0, help=text, show_default=False)


class OnConflict(StrEnum):
    """What to do with a task whose name is taken by another adapter."""

    SKIP = "skip"
    REPLACE = "replace"
    FAIL = "fail"


DtypeName = Literal["bfloat16", "float16", "float32"]
OutputOpt = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write. Must be absent or empty.", show_default=False),
]
