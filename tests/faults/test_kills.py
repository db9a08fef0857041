"""SIGKILL in the middle of a command: nothing acknowledged is lost, nothing is half there, a rerun gets there."""

import random
import shutil

import pytest

from tests.faults.campaign import Tally, kill_at_random, kill_at_steps
from tests.faults.commands import COMMANDS
from tests.faults.world import World
from tests.faults.zygote import KILLED

STRIDES = {"ingest": 90, "vectors": 60, "train": 150, "update": 120, "copy": 150, "import": 60, "generate": 60}
"""Steps from one kill to the next in the quick test; 20 for the other commands."""


def check(tally: Tally) -> None:
    assert (tally.is_clean, tally.examples) == (True, [])


@pytest.mark.one_case
@pytest.mark.parametrize("command", ["evict", *(command for command in COMMANDS if command != "evict")])
def test_a_kill_before_some_steps_loses_nothing(world: World, command: str) -> None:
    check(kill_at_steps(world, command, stride=STRIDES.get(command, 20)))


@pytest.mark.fault
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_before_any_step_loses_nothing(world: World, command: str) -> None:
    check(kill_at_steps(world, command))


@pytest.mark.slow
def test_a_folder_that_is_being_replaced_is_no_adapter_until_it_is_complete(world: World) -> None:
    kills, status = 0, KILLED
    while status == KILLED:
        world.reset("materialize")
        world.output.mkdir()
        config = world.output / "adapter_config.json"
        config.write_text("{}")
        (world.output / "adapter_model.safetensors").write_bytes(b"of another adapter")
        kills += 1
        env = {"ICM_TEST_STEP": str(kills)}
        status = world.run("materialize", sabotage="die_at_step", env=env, force=True).status
        assert not config.exists() or config.read_text() == "{}" or not world.missed("materialize")
    assert kills > 4
    assert world.missed("materialize") == []


@pytest.mark.slow
def test_a_few_kills_at_random_times_lose_nothing(world: World) -> None:
    check(kill_at_random(world, "ingest", 5, random.Random(1)))


@pytest.mark.fault
@pytest.mark.parametrize("command", COMMANDS)
def test_many_kills_at_random_times_lose_nothing(world: World, command: str) -> None:
    check(kill_at_random(world, command, 40, random.Random(command)))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "sabotage"), [("materialize", "in_place"), ("export", "bundle_in_place")])
def test_the_harness_sees_an_output_that_grows_in_its_place(world: World, command: str, sabotage: str) -> None:
    tally = kill_at_steps(world, command, stride=3, sabotage=sabotage)
    assert "the output is neither absent nor complete" in tally.examples


@pytest.mark.slow
def test_the_harness_sees_a_truncated_bundle(world: World) -> None:
    world.reset("export")
    world.output.write_bytes(world.reference("export")["."][:-1])
    assert world.violations("export", []) == ["the output is neither absent nor complete"]
    assert world.missed("export") != []


@pytest.mark.slow
def test_the_harness_sees_a_task_without_its_folder(world: World) -> None:
    world.reset("generate")
    ran = world.run("generate")
    shutil.rmtree(world.output)
    found = world.violations("generate", ran.events)
    assert "a task was made before its folder" in found
    assert any("written, and lost" in violation for violation in found)
    assert world.missed("generate") != []


@pytest.mark.slow
def test_the_harness_sees_a_lost_acknowledgement(world: World) -> None:
    world.reset("vectors")
    assert world.violations("vectors", [{"type": "task", "task": "never"}]) != []
    assert world.violations("vectors", [{"type": "vectors", "task": "poems", "vectors": 4}]) != []
    assert world.missed("vectors") != []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encode", "import", "copy", "generate"])
def test_the_harness_sees_that_nothing_came_of_what_was_acknowledged(world: World, command: str) -> None:
    world.reset(command)
    events = world.run(command).events
    assert world.violations(command, events) == []
    world.reset(command)
    assert world.violations(command, events) != []
    assert world.missed(command) != []
