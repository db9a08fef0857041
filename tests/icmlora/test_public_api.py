"""`import icmlora`: which names are public, that each is documented, and what an import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import icmlora
from icmlora.fleet.api import Fleet

NAMES = [
    *("Adapter", "AdapterRefused", "BaseModelConflict", "BaseModelMismatch", "BaseModelNotFound", "Bundle"),
    *("BundleError", "Cancelled"),
    *(
        "CodeError",
        "CustomModel",
        "DamagedStore",
        "DataError",
        "DeviceUnavailable",
        "Event",
        "Fleet",
        "GeneratorError",
        "IcmError",
    ),
    *(
        "IcmLoraError",
        "LastCopy",
        "LoraModule",
        "Metric",
        "NotRecognized",
        "OutputExists",
        "Progress",
        "RegistryError",
        "StoreLocked",
    ),
    *("StoreNotFound", "TaskConflict", "TaskNotFound", "UnsafeInput", "attach", "base_model_loader"),
    *("convert", "load_adapter", "save_adapter"),
]
METHODS = [
    *(
        "add_base_model",
        "alias_base_model",
        "base_models",
        "check_few_shot",
        "doctor",
        "duplicates",
        "edit",
        "encode",
        "evaluate",
        "evict",
    ),
    *("export_bundle", "extract_vectors", "forget_base_model", "forget_generator", "generate", "generators"),
    *(
        "import_bundle",
        "ingest",
        "load",
        "load_many",
        "materialize",
        "measurable",
        "module_errors",
        "path",
        "plan_removal",
        "prune",
    ),
    *(
        "read_files",
        "recognize",
        "remove",
        "repair",
        "repair_rows",
        "report",
        "restore",
        "restore_database",
        "rollback",
        "separate_base_model",
        "show",
        "stats",
        "tags",
        "task_map",
        "task_names",
    ),
    *("tasks", "train", "train_few_shot"),
    *("update", "verify"),
]


def test_the_public_names_are_these() -> None:
    assert icmlora.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(icmlora, name))
    assert name in dir(icmlora)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Flet"):
        icmlora.Flet  # noqa: B018


def test_the_methods_of_a_fleet_are_these() -> None:
    assert sorted(name for name in dir(Fleet) if not name.startswith("_")) == METHODS


@pytest.mark.parametrize("name", [name for name in METHODS if name != "path"])
def test_a_method_documents_every_argument(name: str) -> None:
    method = getattr(Fleet, name)
    documented = inspect.getdoc(method) or ""
    missing = [argument for argument in list(inspect.signature(method).parameters)[1:] if argument not in documented]
    assert documented
    assert missing == []


@pytest.mark.parametrize("statement", ["import icmlora", "from icmlora import Fleet, IcmError; Fleet('nowhere')"])
def test_it_imports_neither_torch_nor_sql(statement: str) -> None:
    code = f"import sys; {statement}; sys.exit(bool({{'torch', 'numpy', 'sqlalchemy'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_error_of_the_library_is_an_icm_error() -> None:
    for name in NAMES:
        value = getattr(icmlora, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, icmlora.IcmError)
