"""Clocks that jump, and a process that is stopped for so long that its locks are given to others."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.faults.commands import PRUNE
from tests.faults.pairs import PAIRS
from tests.faults.world import World
from tests.faults.zygote import KILLED, wait_until


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ingest", "evict", pytest.param("prune", marks=pytest.mark.fault)])
def test_a_clock_that_jumps_changes_nothing(each: World, command: str) -> None:
    each.reset(command)
    ran = each.run(command, sabotage="clock_jumps")
    assert each.ended_badly(command, ran) == []
    assert each.violations(command, ran.events) == []
    assert each.missed(command) == []


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "postgres" in pair])
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
