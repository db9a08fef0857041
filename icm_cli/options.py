"""Options that several commands share, each written once.

`icm_cli.session.command` adds the global ones to every command, so they work before and after its name. Typer lets
pydantic convert each value; importing that takes as long as all else that a short command imports, so words that need
no conversion are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
import typer.core

from icm_cli.config import DEFAULT_LOCK_TIMEOUT

if TYPE_CHECKING:
    from typer import _click as click  # Typer brings its own copy of click

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
        spelling: Its names and what stands for its value, as the help has them: "--output -o FILE".
        text: What it is for.
        panel: The heading below which the help lists it.
        completes: With what a shell completes its value.
        rules: What else Typer takes, such as `min`.
    """
    names = [word for word in spelling.split() if word.startswith("-")]
    metavar = " ".join(word for word in spelling.split() if not word.startswith("-")) or None
    given: dict[str, Any] = {"metavar": metavar, "help": text, "rich_help_panel": panel}
    return typer.Option(*names, **(given | {"autocompletion": _completing(completes)} | rules))


def argument(metavar: str, text: str | None = None, *, completes: Completed | None = None) -> Any:
    """Return an argument."""
    return typer.Argument(metavar=metavar, help=text, autocompletion=_completing(completes))


def _completing(what: Completed | None) -> Callable[[str], list[str]] | None:
    """Return a function by which a shell completes a value."""

    def answer(incomplete: str) -> list[str]:
        from icm_cli import completion  # a shell asks, a command does not

        return cast(list[str], getattr(completion, f"complete_{what}")(incomplete))

    return None if what is None else answer


StoreOpt = Annotated[
    str | None,
    option(
        "--store STORE",
        "Store: a folder, or postgresql://HOST/DATABASE. Default: $ICM_STORE, then config.toml, then "
        "$XDG_DATA_HOME/icm.",
        panel=GLOBAL_PANEL,
    ),
]
JsonOpt = Annotated[bool, option("--json", "Print JSON, without progress or questions.", panel=GLOBAL_PANEL)]
QuietOpt = Annotated[bool, option("--quiet -q", "Print only the bare answer and errors.", panel=GLOBAL_PANEL)]
VerboseOpt = Annotated[
    int, option("--verbose -v", "Print more details.", panel=GLOBAL_PANEL, count=True, metavar="", show_default=False)
]
NoProgressOpt = Annotated[bool, option("--no-progress", "Show no progress. (env: ICM_NO_PROGRESS)", panel=GLOBAL_PANEL)]
LockTimeoutOpt = Annotated[
    float | None,
    option(
        "--lock-timeout SECONDS",
        f"How long to wait for other icm processes, in all. Default: {DEFAULT_LOCK_TIMEOUT:g}. (env: ICM_LOCK_TIMEOUT)",
        panel=GLOBAL_PANEL,
    ),
]

TaskArg = Annotated[str, argument("TASK", "Name of a task (see `icm ls`).", completes="task")]
TasksArg = Annotated[list[str], argument("TASK...", "Names of tasks (see `icm ls`).", completes="task")]
SomeTasksArg = Annotated[
    list[str] | None, argument("[TASK]...", "Names of tasks. Default: all tasks.", completes="task")
]
BaseModelOpt = Annotated[str | None, option("--base-model NAME", "Only tasks of this base model.", completes="base")]
LoaderOpt = Annotated[
    str | None,
    option(
        "--loader MODULE:FUNCTION",
        "Your function that loads the base model; the path need then not be a transformers model.",
    ),
]
FiltersOpt = Annotated[
    list[str] | None,
    option(
        "--filter -F FIELD=VALUE",
        "Only tasks that pass, as 'rank>=8', 'tag=prod', 'base~llama'. Repeat it: all must hold.",
        completes="filter",
    ),
]
SortOpt = Annotated[
    str | None, option("--sort FIELD[:desc]", "Sort by a field, as 'size:desc'. Default: name.", completes="sort")
]
LimitOpt = Annotated[int | None, option("--limit N", "Show at most N tasks.", min=1)]
FromOpt = Annotated[Path | None, option("--from FILE", "Read this bundle instead of the store.")]
ServedBaseOpt = Annotated[
    str | None,
    option(
        "--base-model NAME",
        "The base model that the engine runs, if icm does not find out or there are several.",
        completes="base",
    ),
]
GatewayOpt = Annotated[
    bool, option("--gateway", "With --print-config vllm: put `icm serve` in front instead of using the plug-in.")
]
BundleArg = Annotated[Path, argument("FILE", "A bundle written by `icm export`.")]
DryRunOpt = Annotated[bool, option("--dry-run -n", "Print what would be done, but do nothing.")]
YesOpt = Annotated[bool, option("--yes -y", "Do not ask.")]
ForceOpt = Annotated[bool, option("--force -f", "Replace an output folder that is not empty.")]
SeedOpt = Annotated[int | None, option("--seed N", "Random seed.")]
DeviceOpt = Annotated[
    str | None, option("--device auto|cpu|cuda|cuda:N|mps", "Device to compute on. Default: auto. (env: ICM_DEVICE)")
]

WorkersOpt = Annotated[
    str | None,
    option(
        "--workers N|ray://HOST:PORT",
        "Compute in N processes on this machine, or on a Ray cluster. Needs Ray. Default: in this process.",
    ),
]
ShardOpt = Annotated[
    str | None,
    option(
        "--shard I/N",
        "Only part I of N of the tasks, as 1/8. Several parts may run at the same time, on many machines.",
    ),
]


def loss_option(name: str, text: str, panel: str | None = None) -> Any:
    """Return an option for an upper limit on an error."""
    return option(f"{name} X", text, min=1e-4, max=0.9, panel=panel)


def gain_option(text: str) -> Any:
    """Return an option for a lower limit on the retained gain."""
    return option("--min-gain G", text, min=0.0, max=1.0)


MinGainOpt = Annotated[
    float | None,
    gain_option("Smallest retained gain that a code may have, on the task's held-out text. Needs the base model."),
]


def quality_option(text: str) -> Any:
    """Return an option for the quality of codes."""
    return option("--quality 1..8", f"1 (smallest) to 8 (most accurate). {text}", min=1, max=8)


def keep_option(text: str) -> Any:
    """Return an option for the share of an adapter's effect that codes keep."""
    return option("--keep SHARE", text, min=0.5, max=0.9999)


def refine_option(text: str) -> Any:
    """Return an option for the number of steps that refine codes."""
    return option("--refine STEPS", text, min=0)


DtypeName = Literal["bfloat16", "float16", "float32"]
OutputOpt = Annotated[Path, option("--output -o DIR", "Folder to write. Must be absent or empty.")]

_KNOWN = "0.29."
"""Beginning of the versions of Typer that convert in the method that is replaced here. Another one does it all."""

_NUMBER = re.compile("[0-9]{1,9}")


def spare_pydantic() -> None:
    """Let all parameters convert without pydantic what is a text, a path or a whole number."""
    if typer.__version__.startswith(_KNOWN):
        asked: Any = typer.core._TyperParameter
        asked.get_runtime_param = lambda parameter: _PlainValues()


class _PlainValues:
    """What Typer asks for the value of a parameter."""

    def coerce(self, value: Any, param: Any, ctx: click.Context) -> Any:
        """Return the value of a parameter from its word, its words or its default."""
        if value is None:
            return () if param.multiple or param.nargs == -1 else None
        kind, rules = param.type_descriptor.annotation, param.type_descriptor.parameter_info
        if type(value) is kind and kind in (str, int, bool):
            return value
        if kind is Path and isinstance(value, str | Path):
            return Path(value)
        if kind == list[str] and isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            return list(value)
        if kind is int and isinstance(value, str) and _NUMBER.fullmatch(value):
            number = int(value)
            if (rules.min is None or number >= rules.min) and (rules.max is None or number <= rules.max):
                return number
        from typer._coercion import build_runtime_param  # imports pydantic, which also says what is wrong with a value

        return build_runtime_param(param.type_descriptor).coerce(value, param=param, ctx=ctx)
