"""Limits of codes that contradict each other: commands refuse them before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS
from tests.icmlora.fleet.stores import files_of

TRAIN = f"train --steps {STEPS}"
CONFLICTS = (
    "--keep .98 --max-error .3",
    "--quality 3 --keep .98",
    "--quality 3 --max-error .3",
    "--max-error .3 --refine 2",
)
OF_SIZE = ("--size 4KB --quality 3", "--size 4KB --keep .98", "--size 4KB --refine 2")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        *((command, options) for command in (TRAIN, f"{TRAIN} --update", "encode") for options in CONFLICTS),
        *(("encode", options) for options in OF_SIZE),
    ],
)
def test_nothing_is_trained_or_changed(icm: Callable[..., Ran], trained: Path, command: str, options: str) -> None:
    before = files_of(trained)
    ran = icm(*command.split(), *options.split(), "--device", "cpu", "--json")
    assert (ran.code, ran.error["kind"], ran.out) == (ExitCode.USAGE, "usage_problem", "")
    assert files_of(trained) == before
