"""`--shard i/n`: parts of a fleet that are worked on by processes which know nothing of each other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora.errors import InvalidShard
from icmlora.fleet.context import Shard
from registry.store import Store
from tests.cli.coded import codes, tasks_of
from tests.cli.conftest import Ran
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
ENCODE = ("encode", "--max-error", "0.22", "--json")
TASKS = ["poems", "rules", "silent"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_task_is_in_exactly_one_shard(count: int) -> None:
    shards = [Shard(number, count) for number in range(1, count + 1)]
    for task in range(200):
        assert sum(shard.has(f"task-{task}") for shard in shards) == 1


def test_shards_have_about_as_many_tasks_each() -> None:
    sizes = [sum(Shard(number, 4).has(f"task-{task}") for task in range(1000)) for number in range(1, 5)]
    assert sum(sizes) == 1000
    assert min(sizes) > 200


def test_which_shard_a_task_is_in_never_changes() -> None:
    assert [Shard(1, 2).has(name) for name in TASKS] == [True, True, False]


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "1", "1/2/3", "-1/2", "a/b", ""])
def test_what_is_no_shard_is_refused(icm: Icm, trained: Path, text: str) -> None:
    with pytest.raises(InvalidShard):
        Shard.of(text)
    ran = icm("vectors", "--shard", text, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.USAGE, "invalid_shard")


@pytest.mark.slow
def test_all_shards_together_encode_every_task_once(icm: Icm, trained: Path) -> None:
    done = [name for number in (1, 2, 3) for name in tasks_of(icm(*ENCODE, "--shard", f"{number}/3"))]
    assert sorted(done) == TASKS


@pytest.mark.slow
def test_all_shards_together_extract_and_measure_every_task(icm: Icm, trained: Path) -> None:
    extracted, measured = list[str](), list[str]()
    for number in (1, 2, 3):
        shard = ("--shard", f"{number}/3", "--device", "cpu", "--json")
        ran = icm("vectors", "--again", *shard)
        extracted += [event["task"] for event in ran.events if event["type"] == "vectors"]
        ran = icm("eval", "--source", "code", *shard)
        assert ran.code == 0
        measured += [event["task"] for event in ran.events if event["type"] == "task"]
    assert sorted(extracted) == TASKS
    assert sorted(measured) == ["poems", "rules"]  # `silent` has no text


def test_a_shard_does_not_wait_for_another_one(icm: Icm, trained: Path) -> None:
    with Store.open(trained, command="icm encode --shard 1/2") as opened, opened.job(LABEL, shared=True):
        assert icm(*ENCODE, "--shard", "2/2", "--lock-timeout", "0").code == 0


def test_a_training_waits_for_a_shard(icm: Icm, trained: Path) -> None:
    with Store.open(trained, command="icm encode --shard 1/2") as opened, opened.job(LABEL, shared=True):
        ran = icm("train", "--device", "cpu", "--steps", "1", "--lock-timeout", "0", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.LOCKED, "store_locked")


@pytest.mark.slow
def test_two_shards_at_once_leave_the_store_as_one_after_the_other(icm: Icm, trained: Path) -> None:
    before = codes(trained)
    script = "from icm_cli.app import main; main()"
    commands = [[sys.executable, "-c", script, "--store", str(trained), *ENCODE, "--shard", f"{n}/2"] for n in (1, 2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    for process in running:
        process.communicate()
    assert [process.returncode for process in running] == [0, 0]
    after = codes(trained)
    assert sorted(after) == TASKS
    assert all(after[name].blob != before[name].blob for name in TASKS)
    assert icm("verify", "--read-data").code == 0
