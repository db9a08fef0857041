"""SIGKILL in the middle of a command: nothing acknowledged is lost, nothing is half there, a rerun gets there."""

import random
import shutil

import pytest

from tests.faults.campaign import kill_at_first_sign, kill_at_random
from tests.faults.commands import COMMANDS
from tests.faults.world import Leftovers, World
from tests.faults.zygote import KILLED

POINTS = {
    "ingest": ["store-before-format", "blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit",
               "rows-committed"],
    "vectors": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed"],
    "train": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed",
              "garbage-rows-gone", "blob-unlinked"],
    "update": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed"],
    "evict": ["rows-before-commit", "eviction-committed", "blob-unlinked"],
    "encode": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed"],
    "import": ["store-before-format", "blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit",
               "rows-committed"],
    "copy": ["store-before-format", "blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit",
             "rows-committed"],
    "generate": ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit", "rows-committed"],
}  # fmt: skip
PAIRS = [(command, point) for command in POINTS for point in POINTS[command]]
QUICK = [("ingest", "blob-renamed"), ("ingest", "rows-before-commit"), ("vectors", "rows-committed"),
         ("train", "garbage-rows-gone"), ("update", "rows-before-commit"), ("update", "rows-committed"),
         ("evict", "eviction-committed"), ("evict", "blob-unlinked"), ("encode", "rows-committed"),
         ("import", "rows-before-commit"), ("copy", "rows-committed"), ("generate", "rows-committed")]  # fmt: skip


def check_point(world: World, command: str, point: str) -> None:
    """Kill a command at a failpoint twice, each time it comes there, then let it end."""
    world.reset(command)
    for number in range(2):
        ran = world.again(command, env={"ICM_FAILPOINT": point})
        assert ran.status == KILLED or number, ran.lines
        assert world.violations(command, ran.events) == []
    check_end(world, command)
    world.prune()
    assert world.leftovers() == Leftovers(0, 0)


def check_end(world: World, command: str) -> None:
    """Let a command end that was killed before."""
    ran = world.again(command)
    assert world.ended_badly(command, ran) == []
    assert world.violations(command, ran.events) == []
    assert world.missed(command) == []


@pytest.mark.one_case
@pytest.mark.parametrize(("command", "point"), QUICK)
def test_a_kill_at_a_failpoint_loses_nothing(world: World, command: str, point: str) -> None:
    check_point(world, command, point)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("command", "point"),
    [pair for pair in PAIRS if pair not in QUICK],
)
def test_a_kill_at_any_failpoint_loses_nothing(world: World, command: str, point: str) -> None:
    check_point(world, command, point)


@pytest.mark.one_case
@pytest.mark.parametrize("call", [1, 3, 5, 6])
def test_an_output_folder_is_absent_or_complete(world: World, call: int) -> None:
    check_output_call(world, "materialize", "die_at_output_call", call)


@pytest.mark.one_case
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exported_file_is_absent_or_complete(world: World, call: int) -> None:
    check_output_call(world, "export", "die_at_output_call", call)


@pytest.mark.fault
@pytest.mark.parametrize("call", [1, 3, 5, 6])
def test_a_generated_folder_is_absent_or_complete(world: World, call: int) -> None:
    check_output_call(world, "generate", "die_at_output_call", call)


def check_output_call(world: World, command: str, sabotage: str, call: int) -> None:
    """Kill a command before a call that changes its output, then let it end."""
    world.reset(command)
    ran = world.run(command, sabotage=sabotage, env={"ICM_TEST_CALL": str(call)})
    assert ran.status == KILLED
    assert world.violations(command, ran.events) == []
    check_end(world, command)
    assert world.leftovers().temporary == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["materialize", "export", pytest.param("generate", marks=pytest.mark.fault)])
def test_an_output_that_is_half_written_has_another_name(world: World, command: str) -> None:
    world.reset(command)
    ran = kill_at_first_sign(world, command)
    assert ran.status == KILLED
    assert world.violations(command, ran.events) == []
    check_end(world, command)
    assert world.leftovers().temporary == 0


@pytest.mark.slow
def test_a_folder_that_is_being_replaced_is_no_adapter_until_it_is_complete(world: World) -> None:
    for call in (1, 2, 3, 4):
        world.reset("materialize")
        world.output.mkdir()
        (world.output / "adapter_config.json").write_text("{}")
        (world.output / "adapter_model.safetensors").write_bytes(b"of another adapter")
        environment = {"ICM_TEST_CALL": str(call)}
        ran = world.run("materialize", sabotage="die_at_output_call", env=environment, force=True)
        config = world.output / "adapter_config.json"
        whole = {} if not config.exists() else {"config": config.read_text() == "{}" or not world.missed("materialize")}
        assert all(whole.values())
        assert ran.status == KILLED
    assert world.run("materialize", force=True).status == 0
    assert world.missed("materialize") == []


@pytest.mark.slow
def test_a_few_kills_at_random_times_lose_nothing(world: World) -> None:
    draw = random.Random(1)
    tally = kill_at_random(world, "ingest", 5, draw)
    assert (tally.violations, tally.goals_missed, tally.left_after_prune, tally.examples) == (0, 0, 0, [])


@pytest.mark.fault
@pytest.mark.parametrize("command", COMMANDS)
def test_many_kills_at_random_times_lose_nothing(world: World, command: str) -> None:
    tally = kill_at_random(world, command, 40, random.Random(command))
    assert (tally.violations, tally.goals_missed, tally.left_after_prune, tally.examples) == (0, 0, 0, [])


@pytest.mark.slow
def test_the_harness_sees_a_half_written_folder(world: World) -> None:
    seen = []
    draw = random.Random(2)
    for _ in range(40):
        world.reset("materialize")
        tally = kill_at_random(world, "materialize", 2, draw, sabotage="in_place")
        seen += tally.examples
        if seen:
            break
    assert "the output is neither absent nor complete" in seen


@pytest.mark.slow
@pytest.mark.parametrize(("command", "sabotage"), [("export", "bundle_in_place"), ("generate", "in_place")])
def test_the_harness_sees_an_output_that_grows_in_its_place(world: World, command: str, sabotage: str) -> None:
    world.reset(command)
    ran = kill_at_first_sign(world, command, sabotage)
    assert ran.status == KILLED
    assert world.output.exists()
    assert world.violations(command, ran.events) == ["the output is neither absent nor complete"]


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
