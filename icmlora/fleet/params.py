"""Declare the parameters of use cases once: names, help and limits, for the command line, `Fleet` and the reference.

    def encode(context: HasContext, tasks: Tasks = (), *, keep: Keep = None) -> EncodeReport: ...

This is plain data; `icm_cli.command` turns it into options.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature, unwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from icmlora.errors import OptionsConflict
from icmlora.io.text import parse_bytes
from icmlora.training.config import DEFAULT_QUALITY, REFINE_STEPS

Completed = Literal["task", "base", "tag", "filter", "sort", "format"]


@dataclass(frozen=True)
class Param:
    """One parameter of a use case.

    Attributes:
        help: The help text of the command line.
        spelling: Option names and value as printed in the help, "--output -o DIR"; without a dash, an argument.
            By default `--` and the parameter's name.
        panel: Help panel of a rarely used option.
        min: Smallest value.
        max: Largest value.
        parse: Converts the text of the command line, if that is not written like the Python value.
        completes: What the shell completes.
        setting: The configuration key that replaces the default on the command line.
    """

    help: str
    spelling: str | None = None
    panel: str | None = None
    min: float | None = None
    max: float | None = None
    parse: Callable[[str], Any] | None = None
    completes: Completed | None = None
    setting: str | None = None

    @property
    def is_argument(self) -> bool:
        """Whether the command line has no option for it."""
        return self.spelling is not None and not self.spelling.startswith("-")

    def check(self, name: str, value: object) -> None:
        """Raise `OptionsConflict` if a number is out of range."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = self.min, self.max
            if (low is not None and value < low) or (high is not None and value > high):
                limits = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
                raise OptionsConflict(f"{name} is {value:g}; it must be {limits}")


def parameters_of(function: Callable[..., Any], skip: int) -> dict[str, Parameter]:
    """Return the parameters of a function after the first ones, with their annotations evaluated.

    The annotations of the others, and of the result, may be imported for type checkers only.
    """
    found = dict(list(signature(function).parameters.items())[skip:])
    plain = SimpleNamespace(__annotations__={name: parameter.annotation for name, parameter in found.items()})
    hints = get_type_hints(plain, unwrap(function).__globals__, include_extras=True)
    return {name: parameter.replace(annotation=hints[name]) for name, parameter in found.items()}


@cache
def params_of(use_case: Callable[..., Any]) -> Mapping[str, Param]:
    """Return the declared parameters of a use case by name."""
    found = parameters_of(use_case, skip=1).items()
    return {name: param for name, parameter in found if (param := param_of(parameter.annotation)) is not None}


def param_of(annotation: object) -> Param | None:
    """Return the `Param` of an annotation, or None without one."""
    extras = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Param)), None)


def age(text: str) -> float:
    """Return an age such as `90`, `90s`, `30m`, `1h` or `7d` in seconds."""
    match = re.fullmatch(r"(\d{1,9})([smhd]?)", text)
    if match is None:
        raise OptionsConflict(f"invalid age {text!r}", hint="use a number and a unit, such as 90s, 30m, 1h or 7d")
    return float(int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]])


# Declarations that several use cases share.

RARE = "Rarely needed"

TaskName = Annotated[str, Param("Task name (see `icm ls`).", "TASK", completes="task")]
NamedTasks = Annotated[Sequence[str], Param("Task names (see `icm ls`).", "TASK...", completes="task")]
Tasks = Annotated[Sequence[str], Param("Task names. Default: all tasks.", "[TASK]...", completes="task")]
BaseModelName = Annotated[str | None, Param("Only tasks of this base model.", "--base-model NAME", completes="base")]
Device = Annotated[
    str,
    Param(
        "Compute device. Default: auto. (env: ICM_DEVICE)",
        "--device auto|cpu|cuda|cuda:N|mps",
        setting="device",
    ),
]
Workers = Annotated[
    str | None,
    Param(
        "Run N local processes, or use a Ray cluster. Needs Ray. Default: one process.",
        "--workers N|ray://HOST:PORT",
        RARE,
    ),
]
ShardOf = Annotated[
    str | None,
    Param(
        "Process only part I of N of the tasks, such as 1/8. Parts can run in parallel on several machines.",
        "--shard I/N",
        RARE,
    ),
]
Filters = Annotated[
    Sequence[str],
    Param(
        "Only tasks that match, such as 'rank>=8', 'tag=prod', 'base~llama'. Repeat to combine with AND.",
        "--filter -F FIELD=VALUE",
        completes="filter",
    ),
]
Sort = Annotated[
    str | None,
    Param("Sort by a field, such as 'size:desc'. Default: name.", "--sort FIELD[:desc]", completes="sort"),
]
Limit = Annotated[int | None, Param("Show at most N tasks.", "--limit N", min=1)]
BundleFile = Annotated[Path | None, Param("Read this bundle instead of the store.", "--from FILE")]
DryRun = Annotated[bool, Param("Print the planned changes without making them.", "--dry-run -n")]
Force = Annotated[bool, Param("Overwrite a non-empty output folder.", "--force -f")]
OutputFolder = Annotated[str | Path, Param("Output folder. Must not exist or be empty.", "--output -o DIR")]
ReplacePlot = Annotated[bool, Param("Replace the --plot FILE if it exists.", "--force -f")]
DtypeName = Literal["bfloat16", "float16", "float32"]
WeightFormat = Annotated[DtypeName, Param("Number format of the weights.", "--dtype")]
Loader = Annotated[
    str | None,
    Param("Custom function that loads the base model, for models outside transformers.", "--loader MODULE:FUNCTION"),
]
Quality = Annotated[
    int | None,
    Param(
        f"1 (smallest) to 8 (most accurate). Default: the current generator's, or {DEFAULT_QUALITY}. In our "
        "measurements 4 keeps 97 % of the gain, and 6 keeps 98 % with four times the bytes.",
        "--quality 1..8",
        min=1,
        max=8,
    ),
]
Keep = Annotated[
    float | None,
    Param(
        "Share of the adapter's effect that each code preserves, such as 0.98. Searches for the smallest such code. "
        "Needs the base model.",
        "--keep SHARE",
        min=0.5,
        max=0.9999,
    ),
]
MaxError = Annotated[
    float | None,
    Param(
        "Maximum relative error of a code, ||dW' - dW|| / ||dW||. 0.3 means 30 %.",
        "--max-error X",
        min=1e-6,
        max=0.9,
    ),
]
Size = Annotated[
    int | None,
    Param(
        "Maximum size of a code, such as 12KiB or 4MB. Each code is as accurate as this allows.",
        "--size SIZE",
        min=1,
        parse=parse_bytes,
    ),
]
Refine = Annotated[
    int | None,
    Param(
        "Steps that fit each code to the effect of its adapter, on the task's samples or on texts generated with the "
        f"adapter. Needs the base model. 0: none. Default: {REFINE_STEPS}, but none with --max-error or --size.",
        "--refine STEPS",
        RARE,
        min=0,
    ),
]
