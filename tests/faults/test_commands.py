"""Commands on each pair: clocks that jump, and processes that are stopped, change nothing; what the store never does,
wrong orders, errors ignored and locks not taken, is caught by the harness."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.commands import PRUNE
from tests.faults.world import World
from tests.faults.zygote import KILLED, wait_until

LOCKED = 11


def prune_while_another_is_stopped(world: World, sabotage: str) -> tuple[int, list[str]]:
    """Stop an ingest between its bytes and its refs, and begin to prune; return how that ended, and broken promises.

    A prune that gets this far has its list of files to delete, then stops until the ingest is done.
    """
    world.reset("ingest")
    statuses = []

    def prune(ingesting: int) -> None:
        def let_both_go_on(pruning: int) -> None:
            wait_until(pruning, "T")
            os.kill(ingesting, signal.SIGCONT)
            wait_until(ingesting, "Z")
            os.kill(pruning, signal.SIGCONT)

        wait_until(ingesting, "T")
        point = {"ICM_FAILPOINT": "manifests-deleted"} if sabotage else {}
        then = let_both_go_on if sabotage else None
        statuses.append(world.icm(PRUNE, sabotage=sabotage, env={"ICM_LOCK_TIMEOUT": "1", **point}, then=then).status)
        os.kill(ingesting, signal.SIGCONT)  # in the other case it is done

    ran = world.run("ingest", sabotage="stops", env={"ICM_FAILPOINT": "blobs-durable"}, then=prune)
    assert ran.status == 0, ran.lines
    return statuses[0], world.violations("ingest", ran.events)


@pytest.mark.slow
def test_a_ref_without_its_bytes_is_caught(each: World) -> None:
    each.reset("ingest")
    ran = each.run("ingest", sabotage="refs_first", env={"ICM_FAILPOINT": "rows-committed"})
    assert ran.status == KILLED
    assert any("missing" in violation for violation in each.violations("ingest", ran.events))


@pytest.mark.slow
def test_an_error_that_is_ignored_is_caught(each: World) -> None:
    each.reset("ingest")
    ran = each.run("ingest", sabotage="errors_ignored")
    assert ran.status == 0, ran.lines
    assert any("missing" in violation for violation in each.violations("ingest", ran.events))


@pytest.mark.slow
def test_an_original_that_goes_before_its_manifest_says_so_is_caught(each: World) -> None:
    each.reset("evict")
    ran = each.run("evict", sabotage="files_first", env={"ICM_FAILPOINT": "blob-unlinked"})
    assert ran.status == KILLED
    assert any("missing" in violation for violation in each.violations("evict", ran.events))


@pytest.mark.slow
def test_a_lock_that_is_not_taken_is_caught(each: World) -> None:
    status, broken = prune_while_another_is_stopped(each, "without_lock")
    assert status == 0
    assert any("missing" in violation for violation in broken), broken


@pytest.mark.slow
def test_nobody_deletes_what_a_stopped_process_is_about_to_publish(each: World) -> None:
    assert prune_while_another_is_stopped(each, "") == (LOCKED, [])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ingest", "evict", pytest.param("prune", marks=pytest.mark.fault)])
def test_a_clock_that_jumps_changes_nothing(each: World, command: str) -> None:
    each.reset(command)
    ran = each.run(command, sabotage="clock_jumps")
    assert each.ended_badly(command, ran) == []
    assert each.violations(command, ran.events) == []
    assert each.missed(command) == []


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pytest.param("postgres+folder", marks=pytest.mark.fault), "postgres+s3"])
def test_a_process_that_lost_its_locks_while_it_was_stopped_records_nothing(
    worlds: Callable[[str], World], pair: str
) -> None:
    world = worlds(pair)
    world.reset("ingest")
    statuses = []

    def cut_and_prune(ingesting: int) -> None:
        wait_until(ingesting, "T")
        world.pair.cut_connections()
        statuses.append(world.icm(PRUNE).status)
        os.kill(ingesting, signal.SIGCONT)

    ran = world.run("ingest", sabotage="stops", env={"ICM_FAILPOINT": "blob-renamed"}, then=cut_and_prune)
    assert statuses == [0]
    assert ran.status not in (0, KILLED)  # its connection is gone, or its temporary files are
    assert not any("Traceback" in line for line in ran.lines)
    assert world.violations("ingest", ran.events) == []
    assert world.run("ingest").status == 0
    assert world.missed("ingest") == []
