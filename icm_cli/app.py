"""The `icm` program: its commands and the mapping from exceptions to exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from icm_cli.config import log_file, switched_on
from icm_cli.errors import ConfigProblem, ExitCode, Failure, StdoutClosed, describe, is_help
from icm_cli.options import JsonOpt, LockTimeoutOpt, NoProgressOpt, QuietOpt, StoreOpt, VerboseOpt
from icm_cli.output import Output
from icm_cli.session import GlobalOptions
from icmlora.io.text import utc

if TYPE_CHECKING:
    from typer import _click as click  # Typer brings its own copy of click

# Help panels and their commands, in display order.
PANELS = {
    "Ingest, encode and materialize": ("ingest", "vectors", "train", "encode", "eval", "materialize", "base"),
    "List, show and edit tasks": ("ls", "show", "log", "edit", "stats", "map", "duplicates", "report"),
    "Create and convert adapters": ("generate", "context", "recognize", "merge", "convert"),
    "Export and serve": ("export", "import", "serve"),
    "Shared stores": ("init", "copy"),
    "Delete, restore and check": ("evict", "restore", "rm", "prune", "verify", "generators", "doctor"),
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
# By default a command is the function (or group) of that name in the module of that name. These are Python keywords or
# built-ins.
_SPELLED = {"eval": ("eval", "evaluate"), "map": ("map", "map_"), "import": ("import_", "import_")}


class CommandGroup(TyperGroup):
    """The `icm` command. Imports a subcommand only when it is run or listed, so that short commands stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands, in display order."""
        return list(_PANEL_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand, or None if it does not exist."""
        # Typer takes its suggestions from `commands`, so a mistyped name imports all of them.
        for name in [cmd_name] if cmd_name in _PANEL_OF else _PANEL_OF:
            if name not in self.commands:
                self.commands[name] = _load_command(name)
        return super().get_command(ctx, cmd_name)


def _load_command(name: str) -> click.Command:
    module, attribute = _SPELLED.get(name, (name, name))
    panel = _PANEL_OF[name]
    found = getattr(import_module(f"icm_cli.commands.{module}"), attribute)
    alone = typer.Typer(rich_markup_mode="rich")
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=name, rich_help_panel=panel)
    else:
        alone.command(name=name, rich_help_panel=panel)(found)
    return typer.main.get_group(alone).commands[name]


app = typer.Typer(
    name="icm", cls=CommandGroup, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"icm {version('icm-lora')}\n")
        raise typer.Exit


VersionOpt = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback(invoke_without_command=True)
def icm(
    ctx: typer.Context,
    version: VersionOpt = False,
    store: StoreOpt = None,
    json: JsonOpt = False,
    quiet: QuietOpt = False,
    verbose: VerboseOpt = 0,
    no_progress: NoProgressOpt = False,
    lock_timeout: LockTimeoutOpt = None,
) -> None:
    """Compress a fleet of LoRA adapters to a few kilobytes per task.

    icm ingest ./loras                 add adapters to the store
    icm train                          train the generator and encode every task
    icm materialize TASK -o adapter/   write an adapter from the store
    icm stats                          show the space saved and the accuracy lost
    """
    ctx.obj = GlobalOptions(store, json, quiet, verbose, no_progress, lock_timeout)
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help() + "\n")
        raise typer.Exit(ExitCode.USAGE)


def main() -> None:
    """Run the program and exit with its exit code."""
    _fill_closed_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code. Failures have been printed on stderr."""
    try:
        code = typer.main.get_command(app).main(args=list(arguments), prog_name="icm", standalone_mode=False)
        sys.stdout.flush()
    except (BrokenPipeError, StdoutClosed):
        _silence_stdout()
        return ExitCode.STDOUT_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        return _print_failure(error, as_json="--json" in arguments)
    return code if isinstance(code, int) else ExitCode.DONE


def _print_failure(error: BaseException, *, as_json: bool) -> ExitCode:
    failure = describe(error)
    if is_help(error) and not as_json:
        sys.stdout.write(f"{error}\n" if str(error) else "")  # Rich has already printed the help
        return failure.code
    if switched_on("ICM_DEBUG"):
        traceback.print_exception(error)
    elif not failure.expected:
        failure = _logged(failure, error)
    # Usage errors raised by Typer hold a reference to their command.
    command_path = getattr(getattr(error, "ctx", None), "command_path", None)
    if failure.hint is None and command_path is not None:
        failure = Failure(failure.code, "usage", failure.message, f"run `{command_path} --help` for usage")
    Output(as_json=as_json).failure(failure)
    return failure.code


def _logged(failure: Failure, error: BaseException) -> Failure:
    """Append the traceback of an unexpected error to the log and name the file in the hint."""
    try:
        log = log_file()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{utc(datetime.now(UTC))}\n{''.join(traceback.format_exception(error))}\n")
    except (OSError, ConfigProblem):
        hint = "set ICM_DEBUG=1 to see the traceback"
    else:
        hint = f"this is a bug in icm; please report it with the end of {log} and the output of `icm doctor`"
    return Failure(failure.code, failure.kind, failure.message, hint)


def _fill_closed_streams() -> None:
    """Open /dev/null for each closed standard stream, as git does, so that no other file gets its descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  # stays open


def _silence_stdout() -> None:
    """Keep Python from reporting the closed pipe again at shutdown."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
