"""Run `icm` in this process, as a shell would see it."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from icm_cli.app import run
from tests.cli.fleet import write_fleet


@dataclass(frozen=True)
class Ran:
    """What a shell sees of a finished command."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The JSON document on stdout."""
        return json.loads(self.out)

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """The JSON line of the error on stderr."""
        return json.loads(self.err.splitlines()[-1])


def modules_of(*arguments: str) -> set[str]:
    """Return the top-level modules that one command line imports, run in a process of its own."""
    script = f"import sys; from icm_cli.app import run; run({list(arguments)!r}); print(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ran.stdout.splitlines()[-1].split()}


@pytest.fixture
def icm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return a function that runs one command line."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return call


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A folder of three runs: rust, shakespeare and sql, with two checkpoints each."""
    return write_fleet(tmp_path / "loras")


@pytest.fixture
def stored(icm: Callable[..., Ran], fleet: Path) -> Path:
    """The same folder, ingested."""
    assert icm("ingest", fleet).code == 0
    return fleet
