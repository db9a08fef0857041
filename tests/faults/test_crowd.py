"""Eight processes on one store: each command succeeds, or says whom it waited for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 10


@pytest.mark.fault
def test_eight_processes_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.faults.crowd", "--seconds", str(SECONDS), "--output", str(output)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    found = json.loads(output.read_text())
    assert (found["unexpected"], found["sound_in_the_end"]) == ({}, True)
    assert found["run"] >= found["processes"]
