"""The first steps of the guide, run as they stand there. Training and measuring take minutes and are not run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran
from tests.docs.pages import ROOT, commands_of

Icm = Callable[..., Ran]
GUIDE = ROOT / "docs" / "guides" / "first-fleet.md"
SHOWN = {command.line: command.output for command in commands_of(GUIDE)}


@pytest.fixture
def at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand in the repository, on a machine that has no base model."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("at_the_root")
def test_ingesting_the_example_fleet_prints_what_the_guide_shows(icm: Icm) -> None:
    first = icm("ingest", "docs/example-fleet")
    assert first.code == 0
    assert first.out + first.err == SHOWN["icm ingest docs/example-fleet"]
    assert icm("ls").out == SHOWN["icm ls"]


@pytest.mark.usefixtures("at_the_root")
def test_ingesting_it_again_says_what_the_guide_says(icm: Icm) -> None:
    icm("-q", "ingest", "docs/example-fleet")
    again = icm("ingest", "docs/example-fleet").out
    assert "0 new adapters, 13 unchanged" in again
    assert "0 new adapters, 13 unchanged" in GUIDE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_guide_names_the_headings_that_eval_prints(icm: Icm, trained: Path) -> None:
    shown = next(line for line in SHOWN["icm train --refine 0"].splitlines() if line.startswith("TASK")).split()
    printed = icm("eval", "--source", "code", "--device", "cpu").out.splitlines()[0].split()
    assert shown == printed


def test_the_guide_names_the_headings_that_stats_prints(icm: Icm, trained: Path) -> None:
    assert SHOWN["icm stats"].splitlines()[0].split() == icm("stats").out.splitlines()[0].split()
