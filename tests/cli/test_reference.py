"""The generated pages are current, and every command explains itself."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.app import PANELS, LazyCommand
from icm_cli.commands.generate import generate as generate_command
from icm_cli.commands.report import report as report_command
from icm_cli.commands.vectors import vectors as vectors_command
from icm_cli.errors import ExitCode
from icm_cli.reference import commands, pages
from icmlora.fleet.few_shot.generate import generate
from icmlora.fleet.few_shot.generated import SAMPLE_TOKENS
from icmlora.fleet.report.report import write_report
from icmlora.fleet.vectors.extraction import SAMPLES_READ
from icmlora.fleet.vectors.vectors import extract_vectors
from icmlora.generator.config import _TOLERANCES
from icmlora.task_vectors.vector import VectorSettings

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
    shown = [parameter for parameter in COMMANDS[name].params if not getattr(parameter, "hidden", False)]
    assert [parameter.name for parameter in shown if not getattr(parameter, "help", None)] == []


def helps(name: str) -> str:
    """Return the help of a command and of all its options."""
    return " ".join([COMMANDS[name].help or "", *(str(getattr(known, "help", "")) for known in COMMANDS[name].params)])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("icm generate", f"The first {SAMPLE_TOKENS} tokens are used"),
        ("icm generate", f"The first {VectorSettings().sample_tokens} tokens are used"),
        ("icm recognize", f"Uses {SAMPLES_READ} of them"),
        ("icm train", f"1 (smallest) to {len(_TOLERANCES)} (most accurate)"),
        ("icm encode", f"1 (smallest) to {len(_TOLERANCES)} (most accurate)"),
        ("icm ingest", f"the exit code is then {int(ExitCode.PARTLY)}"),
        ("icm vectors", f"the exit code is {int(ExitCode.PARTLY)}"),
        ("icm convert", f"Exit code {int(ExitCode.PARTLY)} means"),
        ("icm doctor", f"The exit code is {int(ExitCode.FAILED)} if"),
    ],
)
def test_numbers_in_the_help_are_those_of_the_code(name: str, text: str) -> None:
    assert text in helps(name)


def test_a_short_option_means_the_same_everywhere() -> None:
    meanings: dict[str, set[str]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            names = [] if getattr(parameter, "hidden", False) else parameter.opts
            for short in (name for name in names if len(name) == 2):
                meanings.setdefault(short, set()).update(name for name in names if name.startswith("--"))
    assert {short: found for short, found in meanings.items() if len(found) != 1} == {}
    assert (meanings["-f"], meanings["-n"]) == ({"--force"}, {"--dry-run"})


@pytest.mark.parametrize(
    ("command", "use_case"),
    [
        (vectors_command, extract_vectors),
        (generate_command, generate),
        (report_command, write_report),
    ],
)
def test_a_command_and_its_use_case_have_the_same_defaults(
    command: Callable[..., object], use_case: Callable[..., object]
) -> None:
    of_command, of_library = (inspect.signature(function).parameters for function in (command, use_case))
    told = {name: known.default for name, known in of_command.items() if known.default not in (None, known.empty)}
    shared = {name: getattr(value, "value", value) for name, value in told.items() if name in of_library}
    assert shared == {name: of_library[name].default for name in shared}


def test_the_page_of_exit_codes_lists_every_code() -> None:
    page = (REFERENCE / "exit-codes.md").read_text(encoding="utf-8")
    assert all(f"| {int(code)} | {code.meaning} |" in page for code in ExitCode)


def test_the_list_of_commands_shows_the_first_sentence_of_each_help() -> None:
    listed = {name: summary for summaries in PANELS.values() for name, summary in summaries.items()}
    full = {name: " ".join((LazyCommand(name).load().help or "").split()) for name in listed}
    assert [name for name, summary in listed.items() if not f"{full[name]} ".startswith(f"{summary} ")] == []
