"""The `icm` program: its commands and the mapping from exceptions to exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from icm_cli.config import log_file, switched_on
from icm_cli.errors import ConfigProblem, ExitCode, Failure, StdoutClosed, describe, is_help
from icm_cli.options import JsonOpt, LockTimeoutOpt, NoProgressOpt, QuietOpt, StoreOpt, VerboseOpt
from icm_cli.output import Output
from icm_cli.session import GlobalOptions
from icmlora.io.text import utc

if TYPE_CHECKING:
    from typer import _click as click  # Typer brings its own copy of click

# Help panels in display order, with each command and its summary: the first sentence of the command's own help. It is
# repeated here so that `icm --help` and completion do not import 33 modules.
PANELS = {
    "Ingest, encode and materialize": {
        "ingest": "Add adapters to the store: PEFT folders, training runs and other formats.",
        "vectors": "Extract missing task vectors.",
        "train": "Train a generator per base model, encode every task and evaluate the codes.",
        "encode": "Re-encode tasks with the current generator, without training.",
        "eval": "Measure base model, original, code and other sources on held-out text.",
        "materialize": "Write the adapter of TASK to a folder or file.",
        "base": "List base models and set their locations and aliases.",
    },
    "List, show and edit tasks": {
        "ls": "List the tasks in the store, or in a bundle with --from.",
        "show": "Show one task: its adapters, vectors, code and measured quality.",
        "log": "List the versions of a task, newest first.",
        "edit": "Change the name, tags, note or pin of tasks.",
        "stats": "Show the bytes on disk, the saving and the quality lost.",
        "map": "Compare tasks by their vectors and group them into clusters.",
        "duplicates": "Find tasks with equal or similar adapters.",
        "report": "Write an HTML report about the store.",
    },
    "Create and convert adapters": {
        "generate": "Create an adapter for a new task from a few samples.",
        "context": "Choose example samples to place at the start of every prompt.",
        "recognize": "Find the stored task that matches some samples.",
        "merge": "Merge the adapters of several tasks into one.",
        "convert": "Convert adapters to another format or a smaller size.",
    },
    "Export and serve": {
        "export": "Write a generator and the codes of tasks to a bundle file.",
        "import": "Add the generator, codes and tasks of a bundle to the store.",
        "serve": "Serve every task as a model of an OpenAI-compatible API.",
    },
    "Shared stores": {
        "init": "Create a shared store in PostgreSQL and an object store.",
        "copy": "Copy tasks from one store to another.",
    },
    "Delete, restore and check": {
        "evict": "Delete originals after checking that their codes can replace them.",
        "restore": "Replace placeholders of `icm evict --placeholder` with their adapters.",
        "rm": "Remove tasks with all versions of their adapters, vectors, codes and measurements.",
        "prune": "Delete files that no task needs and leftovers of interrupted commands.",
        "verify": "Check the store for damage.",
        "generators": "List generators and the tasks that need them.",
        "doctor": "Check versions, devices, settings and the store.",
    },
}
# By default a command is the function (or group) of that name in the module of that name. These are Python keywords or
# built-ins.
_SPELLED = {"eval": ("eval", "evaluate"), "map": ("map", "map_"), "import": ("import_", "import_")}


class LazyCommand(TyperCommand):
    """A subcommand that is imported when it runs, so that short commands, `icm --help` and completion stay fast."""

    def load(self) -> click.Command:
        """Import and return the command."""
        module, attribute = _SPELLED.get(str(self.name), (self.name, self.name))
        found = getattr(import_module(f"icm_cli.commands.{module}"), str(attribute))
        alone = typer.Typer(rich_markup_mode="rich")
        if isinstance(found, typer.Typer):
            alone.add_typer(found, name=self.name)
        else:
            alone.command(name=self.name)(found)
        return typer.main.get_group(alone).commands[str(self.name)]

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Return the context of the imported command."""
        return self.load().make_context(*args, **kwargs)


class CommandGroup(TyperGroup):
    """The `icm` command."""

    def __init__(self, **settings: Any) -> None:
        """Declare the subcommands in display order."""
        super().__init__(**settings)
        for panel, summaries in PANELS.items():
            for name, summary in summaries.items():
                self.commands[name] = LazyCommand(name, help=summary, rich_help_panel=panel, rich_markup_mode="rich")


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
