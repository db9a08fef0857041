"""Where there can be no stand-in for a card (`tests/device`), its tests say so; in CI they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[1]
_REFUSALS = "tests/device/cuda/test_refusals.py"


def run_without_compiler(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run some tests on the stand-in where there is no compiler, and none was there before."""
    options = ("-q", "-rs", "-p", "no:cacheprovider", "-p", "tests.device.as_cuda", _REFUSALS)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "STAND_IN"))}
    there = bare | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)} | environment
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, cwd=_ROOT, env=there, capture_output=True, text=True, check=False)


def test_without_a_compiler_its_tests_are_skipped_and_say_why(tmp_path: Path) -> None:
    ran = run_without_compiler(tmp_path)
    assert (ran.returncode, "no g++ to compile" in ran.stdout, "passed" in ran.stdout) == (0, True, False)


def test_where_it_is_required_they_fail(tmp_path: Path) -> None:
    ran = run_without_compiler(tmp_path, STAND_IN_REQUIRED="1")
    assert (ran.returncode != 0, "no g++ to compile" in ran.stderr) == (True, True)
