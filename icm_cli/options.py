"""Write Typer options, and declare those that belong to the command line rather than to a use case.

`icm_cli.command` adds the global options to every command, so they work before and after its name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from icm_cli.config import DEFAULT_LOCK_TIMEOUT
from icmlora.fleet.params import Completed

GLOBAL_PANEL = "Global options"


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
YesOpt = Annotated[bool, option("--yes -y", "Skip the confirmation question.")]
