"""Run `icm` in this process, as a shell would see it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from icm_cli.app import run
from icmlora.fleet.measure.measure import SourceResult, TaskLosses
from icmlora.fleet.measure.metric_result import MetricResult
from icmlora.fleet.train.candidates import Candidate
from registry.manifests import Source
from tests.cli.fleet import write_fleet
from tests.quick import quick_codes
from tests.rewriting import moved
from tests.shared import built_once

__all__ = ["quick_codes"]


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
    """Return the top-level packages that one command line imports, run in a process of its own."""
    return {name.partition(".")[0] for name in imported_by(*arguments)}


def imported_by(*arguments: str) -> set[str]:
    """Return the full names of the modules that one command line imports, run in a process of its own."""
    return modules_after(f"from icm_cli.app import run; run({list(arguments)!r})")


def modules_after(code: str) -> set[str]:
    """Return the top-level modules that are imported after some code, run in a process of its own."""
    script = f"import sys; {code}; print(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


@pytest.fixture
def icm(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Return a function that runs one command line."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(int(code), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def stored_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of three runs, and a store that ingested them; made once, not to be changed."""

    def build(folder: Path) -> None:
        loras = write_fleet(folder / "loras")
        assert run(["--store", str(folder / "store"), "-q", "ingest", str(loras)]) == 0

    return built_once(tmp_path_factory, "stored", build)


@pytest.fixture
def fleet(stored_template: Path, tmp_path: Path) -> Path:
    """A folder of three runs: rust, shakespeare and sql, with two checkpoints each."""
    return Path(shutil.copytree(stored_template / "loras", tmp_path / "loras"))


@pytest.fixture
def stored(stored_template: Path, fleet: Path, tmp_path: Path) -> Path:
    """The same folder, ingested."""
    store = Path(shutil.copytree(stored_template / "store", tmp_path / "store"))
    moved(store, stored_template / "loras", fleet)
    return fleet


@pytest.fixture
def plain_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the retained gain be what the error leaves of dW: random adapters have gains by chance."""

    def result_of(
        self: TaskLosses,
        source: Source,
        score: MetricResult,
        error: float | None,
        references: Mapping[Source, SourceResult],
    ) -> SourceResult:
        gain = None if error is None else 1 - error
        return SourceResult(source, score, gain, error)

    monkeypatch.setattr(TaskLosses, "result_of", result_of)


@pytest.fixture
def tuned_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tuned network be chosen: on random adapters it hardly ever is smaller."""
    let_the_tuned_win(monkeypatch)


def let_the_tuned_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do so until the patch ends."""
    monkeypatch.setattr(Candidate, "cost", lambda self, before: -len(self.data))
