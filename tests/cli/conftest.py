"""Run `icm` in this process, as a shell would see it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from icm_cli.app import run


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


@pytest.fixture
def icm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return a function that runs one command line."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return call
