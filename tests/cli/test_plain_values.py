"""What the command line takes as it is, without pydantic, is what Typer makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from icm_cli.app import app
from icm_cli.options import _FastCoercion
from tests.cli.conftest import modules_of

build_runtime_param = pytest.importorskip("typer._coercion").build_runtime_param
WORDS = [
    "",
    "a",
    "7",
    "0",
    "-1",
    "007",
    "1_0",
    " 5",
    "٣",
    "99999999999999999999",
    "1.5",
    "inf",
    "x/../y",
    "~",
    "-",
    "true",
]


def parameters(command: Any) -> Iterator[Any]:
    """Yield the parameters of a command and of all in it."""
    yield from command.params
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for name in command.list_commands(context):
            yield from parameters(command.get_command(context, name))


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    """One parameter of each kind and rule that the commands have."""
    found = list(parameters(typer.main.get_command(app)))
    return {str((one.type_descriptor.annotation, rules(one), one.multiple, one.nargs)): one for one in found}


def rules(parameter: Any) -> tuple[object, object]:
    info = parameter.type_descriptor.parameter_info
    return info.min, info.max


def taken(convert: Any, value: object, parameter: Any) -> object:
    """Return what a value becomes, or the message that refuses it."""
    try:
        return convert.coerce(value, param=parameter, ctx=typer.Context(cast(Any, typer.main.get_command(app))))
    except typer.BadParameter as error:
        return error.format_message()


@pytest.mark.parametrize("word", [*WORDS, None])
def test_a_value_is_what_typer_makes_of_it(kinds: dict[str, Any], word: str | None) -> None:
    for kind, parameter in kinds.items():
        several = parameter.multiple or parameter.nargs == -1
        value = [word, "b"] if several and word is not None else word
        own = taken(_FastCoercion(), value, parameter)
        its = taken(build_runtime_param(parameter.type_descriptor), value, parameter)
        assert (kind, type(own), own) == (kind, type(its), its)


@pytest.mark.slow
def test_a_short_command_does_not_import_pydantic(tmp_path: Path) -> None:
    assert "pydantic" not in modules_of("--store", str(tmp_path), "ls", "--limit", "20", "-F", "rank>=8")
