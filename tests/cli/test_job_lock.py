"""One process at a time trains, updates or meta-trains for a base model; the others wait, or are told who does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora import Fleet
from tests.cli.coded import current
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import EPISODES, STEPS
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)
UPDATE = ("train", "--update", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)
FEW_SHOT = ("train", "--few-shot", "--episodes", EPISODES, "--device", "cpu")
HOLD = """
import sys, time
from pathlib import Path
from registry.store import Store

with Store.open(Path(sys.argv[1]), command="icm train") as store, store.job(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline() if sys.argv[3] == "-" else time.sleep(float(sys.argv[3]))
"""


@contextmanager
def another_process_trains(store: Path, base_model: str = LABEL, seconds: float | None = None) -> Iterator[int]:
    """Let another process hold the job lock, for some seconds or to the end of the block; yield its number."""
    command = [sys.executable, "-c", HOLD, str(store), base_model, "-" if seconds is None else str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.communicate("\n")


@pytest.mark.one_case
@pytest.mark.parametrize("command", [TRAIN, UPDATE, FEW_SHOT], ids=["train", "update", "few-shot"])
def test_the_second_one_is_told_who_trains_and_changes_nothing(
    icm: Icm, started: Path, command: tuple[object, ...]
) -> None:
    before = current(started)
    with another_process_trains(started) as pid:
        ran = icm(*command, "--lock-timeout", 0.1, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.LOCKED, "store_locked")
    assert LABEL in ran.error["message"]
    assert f"process {pid}: icm train" in ran.error["message"]
    assert "--lock-timeout" in ran.error["hint"]
    assert current(started) == before


def test_tasks_are_imported_and_registered_for_a_base_model_that_is_in_training(started: Path, tmp_path: Path) -> None:
    fleet, samples = Fleet(started, lock_timeout=0.1), tmp_path / "samples.jsonl"
    bundle = fleet.export_bundle(tmp_path / "fleet.icm").file
    fleet.remove(["silent"])
    samples.write_text("".join(json.dumps({"text": f"grey geese number {number}"}) + "\n" for number in range(4)))
    with another_process_trains(started):
        fleet.import_bundle(bundle)
        fleet.generate("geese", samples, tmp_path / "out", register=True, refine=1, device="cpu")
    assert [row.name for row in fleet.tasks()] == ["geese", "poems", "rules", "silent"]


def test_the_second_one_waits_for_the_first(icm: Icm, mixed: Path) -> None:
    with another_process_trains(mixed, seconds=0.5):
        assert icm(*TRAIN).code == 0
    assert current(mixed).version == 1


@pytest.mark.slow
def test_a_training_for_another_base_model_does_not_wait(icm: Icm, mixed: Path) -> None:
    with another_process_trains(mixed, "another/model"):
        assert icm(*TRAIN, "--lock-timeout", 0).code == 0


@pytest.mark.slow
def test_reading_and_ingesting_do_not_wait(icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path) -> None:
    folder = mixed_template / "loras" / "poems"
    with another_process_trains(trained):
        for command in (("ls",), ("stats",), ("materialize", "poems", "-o", tmp_path / "out"), ("ingest", folder)):
            assert icm(*command, "--lock-timeout", 0).code == 0, command


@pytest.mark.slow
def test_a_command_that_waits_says_for_whom(icm: Icm, trained: Path) -> None:
    with another_process_trains(trained, seconds=1.6) as pid:
        ran = icm("encode", "rules", "--max-error", "0.3")
    assert ran.code == 0
    assert ran.err.count(f"waiting for base model {LABEL!r}, held by process {pid}: icm train\n") == 1
