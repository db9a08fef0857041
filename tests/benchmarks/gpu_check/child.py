"""Run a stage in a process of its own, on the device or on the stand-in for a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu_check.on_stand_in import NONE_HERE

ROOT = Path(__file__).parents[3]
Run = Callable[..., dict[str, Any]]
"""Runs a stage: name, device, store and the stage's options -> what it took and found."""


class StageFailed(Exception):
    """Say which stage failed; why is on stderr."""


def in_child(name: str, device: str, store: Path, **options: object) -> dict[str, Any]:
    """Run one stage."""
    return _run("stage", name, device, store, options)


def on_stand_in(name: str, device: str, store: Path, **options: object) -> dict[str, Any]:
    """Run one stage, on the stand-in if it is for a card."""
    return _run("stage" if device == "cpu" else "on_stand_in", name, device, store, options)


def no_stand_in() -> str | None:
    """Return why there is no stand-in for a card on this machine, None if there is one."""
    done = _python("on_stand_in", [], sees_cards=False)
    if done.returncode == NONE_HERE:
        return done.stdout.strip()
    if done.returncode:
        raise StageFailed("the stand-in for a card failed")
    return None


def _run(module: str, name: str, device: str, store: Path, options: dict[str, object]) -> dict[str, Any]:
    sees_cards = module == "stage" and device != "cpu"
    done = _python(module, [name, device, str(store), json.dumps(options)], sees_cards=sees_cards)
    if done.returncode:
        raise StageFailed(f"stage {name} on {device} failed")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} on {device}: {found['seconds']} s", file=sys.stderr, flush=True)
    return found


def _python(module: str, arguments: list[str], *, sees_cards: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.benchmarks.gpu_check.{module}", *arguments]
    environment = os.environ if sees_cards else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
