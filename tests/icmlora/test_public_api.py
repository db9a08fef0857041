"""`import icmlora`: which names are public, that each is documented, and what an import costs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast, get_args, get_origin

import pytest

import icmlora
from icmlora.fleet.api import Fleet
from icmlora.fleet.context import Context
from icmlora.fleet.params import param_of, parameters_of

NAMES = icmlora.__all__
METHODS = [name for name in dir(Fleet) if not name.startswith("_") and not hasattr(Context, name)]
TYPES = re.compile(r"[A-Z]\w+")
GENERAL = {
    "Callable",
    "Collection",
    "Context",
    "False",
    "Iterator",
    "Literal",
    "Mapping",
    "None",
    "NoneType",
    "Optional",
    "Path",
    "Sequence",
    "Store",
    "Union",
}
# Words that an argument can have, listed with it.
ALIASES = {"Conflict", "LoadIn", "MergeMethod", "Rung", "Source", "View"}


def without_param(annotation: object) -> object:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def signature_types(method: object) -> set[str]:
    function = cast(Callable[..., object], method)
    kinds = [parameter.annotation for parameter in parameters_of(function, skip=1).values()]
    shown = [inspect.signature(function).return_annotation, *map(without_param, kinds)]
    return {name for annotation in shown for name in TYPES.findall(str(annotation))} - GENERAL - ALIASES


@pytest.mark.parametrize("name", METHODS)
def test_the_types_of_a_methods_arguments_and_report_are_public(name: str) -> None:
    assert signature_types(getattr(Fleet, name)) <= set(NAMES)


@pytest.mark.parametrize("name", METHODS)
def test_the_errors_that_a_method_documents_are_public(name: str) -> None:
    _, _, raises = (inspect.getdoc(getattr(Fleet, name)) or "").partition("Raises:")
    assert set(re.findall(r"^ +([A-Z]\w+):", raises, re.MULTILINE)) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(icmlora, name))
    assert name in dir(icmlora)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Flet"):
        icmlora.Flet  # noqa: B018


@pytest.mark.parametrize("name", METHODS)
def test_a_method_documents_every_argument(name: str) -> None:
    method = getattr(Fleet, name)
    documented = inspect.getdoc(method) or ""
    missing = [
        argument
        for argument, parameter in parameters_of(method, skip=1).items()
        if argument not in documented and param_of(parameter.annotation) is None
    ]
    assert documented
    assert missing == []


@pytest.mark.parametrize("statement", ["import icmlora", "from icmlora import Bundle, IcmError, Progress"])
def test_it_imports_neither_torch_nor_sql(statement: str) -> None:
    code = f"import sys; {statement}; sys.exit(bool({{'torch', 'numpy', 'sqlalchemy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_of_the_library_is_an_icm_error() -> None:
    for name in NAMES:
        value = getattr(icmlora, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, icmlora.IcmError)


def test_a_module_named_registry_beside_the_users_script_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "registry.py").write_text("MODELS = {}")
    script = tmp_path / "serve.py"
    script.write_text("import icmlora")

    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)

    expected = f"{tmp_path / 'registry.py'} hides icm's own package `registry`. Rename it, or run from another folder."
    assert ran.stderr.splitlines()[-1] == f"ImportError: {expected}"
