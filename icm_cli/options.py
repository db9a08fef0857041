"""Options shared by several commands.

`icm_cli.session.command` adds the global options to every command, so they work before and after its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from icm_cli.config import DEFAULT_LOCK_TIMEOUT

GLOBAL_PANEL = "Global options"
Completed = Literal["task", "base", "tag", "filter", "sort", "format"]


def option(
    spelling: str,
    text: str | None = None,
    *,
    panel: str | None = None,
    completes: Completed | None = None,
    **rules: Any,
) -> Any:
    """Return an option.

    Args:
        spelling: The names and the placeholder for the value, as printed in the help: "--output -o FILE".
        text: The help text.
        panel: The help panel.
        completes: The kind of value that shell completion offers.
        rules: Further arguments for Typer, such as `min`.
    """
    names = [word for word in spelling.split() if word.startswith("-")]
    metavar = " ".join(word for word in spelling.split() if not word.startswith("-")) or None
    given: dict[str, Any] = {"metavar": metavar, "help": text, "rich_help_panel": panel}
    return typer.Option(*names, **(given | {"autocompletion": _completing(completes)} | rules))


def argument(metavar: str, text: str | None = None, *, completes: Completed | None = None) -> Any:
    """Return an argument."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=_completing(completes))


def _completing(what: Completed | None) -> Callable[[str], list[str]] | None:
    """Return the shell completion function for a kind of value."""

    def answer(incomplete: str) -> list[str]:
        from icm_cli import completion  # only needed for shell completion

        return cast(list[str], getattr(completion, f"complete_{what}")(incomplete))

    return None if what is None else answer


StoreOpt = Annotated[
    str | None,
    option(
        "--store STORE",
        "Store: a folder or postgresql://HOST/DATABASE. Default: $ICM_STORE, then config.toml, then "
        "$XDG_DATA_HOME/icm.",
        panel=GLOBAL_PANEL,
    ),
]
JsonOpt = Annotated[bool, option("--json", "Print JSON. No progress display, no questions.", panel=GLOBAL_PANEL)]
QuietOpt = Annotated[bool, option("--quiet -q", "Print only the result and errors.", panel=GLOBAL_PANEL)]
VerboseOpt = Annotated[
    int, option("--verbose -v", "Print more detail.", panel=GLOBAL_PANEL, count=True, metavar="", show_default=False)
]
NoProgressOpt = Annotated[
    bool, option("--no-progress", "Hide the progress display. (env: ICM_NO_PROGRESS)", panel=GLOBAL_PANEL)
]
LockTimeoutOpt = Annotated[
    float | None,
    option(
        "--lock-timeout SECONDS",
        f"Total time to wait for other icm processes. Default: {DEFAULT_LOCK_TIMEOUT:g}. (env: ICM_LOCK_TIMEOUT)",
        panel=GLOBAL_PANEL,
    ),
]

TaskArg = Annotated[str, argument("TASK", "Task name (see `icm ls`).", completes="task")]
TasksArg = Annotated[list[str], argument("TASK...", "Task names (see `icm ls`).", completes="task")]
SomeTasksArg = Annotated[list[str] | None, argument("[TASK]...", "Task names. Default: all tasks.", completes="task")]
BaseModelOpt = Annotated[str | None, option("--base-model NAME", "Only tasks of this base model.", completes="base")]
LoaderOpt = Annotated[
    str | None,
    option(
        "--loader MODULE:FUNCTION",
        "Custom function that loads the base model, for models outside transformers.",
    ),
]
FiltersOpt = Annotated[
    list[str] | None,
    option(
        "--filter -F FIELD=VALUE",
        "Only tasks that match, such as 'rank>=8', 'tag=prod', 'base~llama'. Repeat to combine with AND.",
        completes="filter",
    ),
]
SortOpt = Annotated[
    str | None, option("--sort FIELD[:desc]", "Sort by a field, such as 'size:desc'. Default: name.", completes="sort")
]
LimitOpt = Annotated[int | None, option("--limit N", "Show at most N tasks.", min=1)]
FromOpt = Annotated[Path | None, option("--from FILE", "Read this bundle instead of the store.")]
DryRunOpt = Annotated[bool, option("--dry-run -n", "Print the planned changes without making them.")]
YesOpt = Annotated[bool, option("--yes -y", "Skip the confirmation question.")]
ForceOpt = Annotated[bool, option("--force -f", "Overwrite a non-empty output folder.")]
SeedOpt = Annotated[int | None, option("--seed N", "Random seed.")]
DeviceOpt = Annotated[
    str | None, option("--device auto|cpu|cuda|cuda:N|mps", "Compute device. Default: auto. (env: ICM_DEVICE)")
]

WorkersOpt = Annotated[
    str | None,
    option(
        "--workers N|ray://HOST:PORT",
        "Run N local processes, or use a Ray cluster. Needs Ray. Default: one process.",
    ),
]
ShardOpt = Annotated[
    str | None,
    option(
        "--shard I/N",
        "Process only part I of N of the tasks, such as 1/8. Parts can run in parallel on several machines.",
    ),
]


def max_error_option(text: str) -> Any:
    """Return an option for an upper limit on the relative error of codes."""
    return option("--max-error X", text, min=1e-4, max=0.9)


def quality_option(text: str) -> Any:
    """Return an option for the quality of codes."""
    return option("--quality 1..8", f"1 (smallest) to 8 (most accurate). {text}", min=1, max=8)


def keep_option(text: str) -> Any:
    """Return an option for the share of an adapter's effect that codes preserve."""
    return option("--keep SHARE", text, min=0.5, max=0.9999)


def refine_option(text: str) -> Any:
    """Return an option for the number of refinement steps."""
    return option("--refine STEPS", text, min=0)


DtypeName = Literal["bfloat16", "float16", "float32"]
OutputOpt = Annotated[Path, option("--output -o DIR", "Output folder. Must not exist or be empty.")]
