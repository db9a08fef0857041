"""Generate docs/reference from the commands and the exit codes themselves: `python -m icm_cli.reference FOLDER`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from icm_cli.app import app
from icm_cli.config import VARIABLES
from icm_cli.errors import TABLE, ExitCode
from icm_cli.options import GLOBAL_PANEL
from icm_cli.session import GlobalOptions

_MADE_BY = "<!-- made by `make docs` from the code; do not edit -->"


def pages() -> dict[str, str]:
    """Return file name -> text of every generated page."""
    return {"cli.md": "\n".join(_cli_page()) + "\n", "exit-codes.md": "\n".join(_exit_page()) + "\n"}


def commands() -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """Yield every command that does something, as (`icm base add`, command), in the order of the help."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    yield from _walk(root, "icm")


def _walk(group: TyperGroup, prefix: str) -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            if command.invoke_without_command:
                yield f"{prefix} {name}", command
            yield from _walk(command, f"{prefix} {name}")
        elif isinstance(command, TyperCommand) and not command.hidden:
            yield f"{prefix} {name}", command


def _cli_page() -> Iterator[str]:
    yield from ("# Commands", "", _MADE_BY, "")
    yield "Every command takes the global options, before or after its name, and `--help`."
    yield from ("", "## Global options", "")
    _, any_command = next(iter(commands()))
    yield from _options(any_command, only_global=True)
    for name, command in commands():
        yield from ("", f"## {name}", "", *_described(command), *_usage(name, command), "")
        yield from _arguments(command)
        yield from _options(command, only_global=False)
    yield from ("", "## Environment", "", "| variable | meaning |", "|---|---|")
    yield from (f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items())


def _described(command: TyperCommand | TyperGroup) -> Iterator[str]:
    text, _, example = inspect.cleandoc(command.help or "").partition("Example:\n")
    yield text.rstrip()
    if example:
        yield from ("", "```console", *(f"$ {line.strip()}" for line in example.splitlines() if line.strip()), "```")
    yield ""


def _usage(name: str, command: TyperCommand | TyperGroup) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    yield f"Usage: `{name} {' '.join(command.collect_usage_pieces(context))}`"


def _arguments(command: TyperCommand | TyperGroup) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and not parameter.hidden:
            yield f"- `{parameter.metavar or parameter.name}`: {parameter.help}"


def _options(command: TyperCommand | TyperGroup, *, only_global: bool) -> Iterator[str]:
    for parameter in command.params:
        if not isinstance(parameter, TyperOption) or parameter.hidden or parameter.name == "help":
            continue
        is_global = parameter.name in GlobalOptions.__dataclass_fields__ and parameter.rich_help_panel == GLOBAL_PANEL
        if is_global == only_global:
            yield f"- {_spelled(parameter)}: {parameter.help}{_default(parameter)}"


def _spelled(option: TyperOption) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return f"{names} `{option.metavar}`" if option.metavar else names


def _default(option: TyperOption) -> str:
    value = option.default
    if not option.show_default or value is None or isinstance(value, bool) or callable(value):
        return ""
    return f" Default: `{getattr(value, 'value', value)}`."


def _exit_page() -> Iterator[str]:
    yield from ("# Exit codes", "", _MADE_BY, "", "| code | meaning | errors |", "|--:|---|---|")
    for code in ExitCode:
        errors = ", ".join(f"`{name.rpartition('.')[2]}`" for name, mapped in TABLE.items() if mapped is code)
        yield f"| {int(code)} | {code.meaning} | {errors} |"
    yield ""
    yield "Other codes than 0 are failures; codes are only added. With `--json` the error is one line on stderr:"
    yield '`{"type": "error", "code": 13, "kind": "damaged_blob", "message": "...", "hint": "..."}`.'


def main() -> None:
    """Write the pages into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
