"""The generated pages are current, and every command explains itself."""

from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icm_cli.reference import commands, pages

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
COMMANDS = dict(commands())


@pytest.mark.parametrize("name", pages())
def test_the_page_in_the_repository_is_what_make_docs_writes(name: str) -> None:
    assert (REFERENCE / name).read_text(encoding="utf-8") == pages()[name], "run `make docs`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example(name: str) -> None:
    described, _, example = (COMMANDS[name].help or "").partition("Example:\n")
    assert described.strip()
    assert "icm" in example


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    assert [parameter.name for parameter in COMMANDS[name].params if not getattr(parameter, "help", None)] == []


def test_the_page_of_exit_codes_lists_every_code() -> None:
    page = (REFERENCE / "exit-codes.md").read_text(encoding="utf-8")
    assert all(f"| {int(code)} | {code.meaning} |" in page for code in ExitCode)
