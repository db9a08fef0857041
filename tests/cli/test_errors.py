"""The table from exceptions to exit codes."""

import errno
import importlib
import os

import pytest
import typer

from icm_cli.errors import TABLE, ExitCode, Interrupted, UsageProblem, describe, full_name
from icmlora.errors import AdapterRefused, UnsafeInput
from registry.errors import DamagedBlob, MissingBlob, RegistryError, StoreLocked, TaskNotFound


@pytest.mark.parametrize("name", TABLE)
def test_every_class_in_the_table_exists(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    assert issubclass(kind, Exception)
    assert full_name(kind) == name


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (StoreLocked("x"), ExitCode.LOCKED, "store_locked"),
        (DamagedBlob("x"), ExitCode.DAMAGED, "damaged_blob"),
        (MissingBlob("x"), ExitCode.DAMAGED, "missing_blob"),
        (RegistryError("x"), ExitCode.FAILED, "registry_error"),
        (AdapterRefused("x", kind="dora"), ExitCode.FAILED, "dora"),
        (UnsafeInput("x", kind="pickle"), ExitCode.UNSAFE, "pickle"),
        (UsageProblem("x"), ExitCode.USAGE, "usage_problem"),
        (Interrupted("x"), ExitCode.INTERRUPTED, "interrupted"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), ExitCode.NO_SPACE, "no_space"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), ExitCode.FAILED, "permission_error"),
    ],
)
def test_an_error_has_a_code_and_a_kind(error: BaseException, code: ExitCode, kind: str) -> None:
    failure = describe(error)
    assert (failure.code, failure.kind, failure.expected) == (code, kind, True)


def test_the_hint_of_an_error_is_printed() -> None:
    assert describe(TaskNotFound("dog-detecton", ("dog-detection",))).hint == "did you mean 'dog-detection'?"


def test_a_usage_error_has_the_message_that_typer_would_print() -> None:
    failure = describe(typer.BadParameter("Value error, too small", param_hint="--rank"))
    assert (failure.code, failure.kind) == (ExitCode.USAGE, "bad_parameter")
    assert failure.message == "Invalid value for --rank: too small"


def test_a_system_error_names_the_file() -> None:
    assert describe(PermissionError(errno.EACCES, "Permission denied", "a/b")).message == "a/b: Permission denied"


@pytest.mark.parametrize(("number", "word"), [(errno.EROFS, "read-only"), (errno.EACCES, "permissions")])
def test_where_nothing_can_be_written_there_is_a_way_out(number: int, word: str) -> None:
    assert word in str(describe(OSError(number, os.strerror(number), "/mnt/out")).hint)


def test_an_unexpected_error_is_a_bug() -> None:
    failure = describe(ZeroDivisionError("division by zero"))
    assert (failure.code, failure.expected) == (ExitCode.FAILED, False)


def test_every_code_has_a_meaning_and_is_unique() -> None:
    assert all(code.meaning for code in ExitCode)
    assert len({int(code) for code in ExitCode}) == len(ExitCode.__members__)
