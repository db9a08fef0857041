"""Kill each command at random times, or before its n-th step, and count what broke.

After every kill the promises are checked. After one to three kills in a row the same command runs to its end, must
reach its goal, and what the kills left must be gone after a prune.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import astuple, dataclass, field
from functools import partial

from tests.faults.promises import acknowledges
from tests.faults.world import World
from tests.faults.zygote import KILLED, Run

_MOST_IN_A_ROW = 3


@dataclass
class Tally:
    """The results of many kills of one command."""

    kills: int = 0
    reruns: int = 0
    """Runs of the same command to its end, after one to three kills."""
    violations: int = 0
    goals_missed: int = 0
    acknowledged: int = 0
    """Results that a command had reported before it was killed; each must still be there."""
    orphans: int = 0
    """Blobs that nothing reached right after the kills; the rerun takes most of them up."""
    temporary_files: int = 0
    """Half-written files and folders right after the kills."""
    uncommitted: int = 0
    """States that the database did not have right after the kills."""
    left_after_rerun: int = 0
    left_after_prune: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.violations or self.goals_missed or self.left_after_prune)


def kill_at_random(world: World, command: str, kills: int, draw: random.Random) -> Tally:
    """Kill one command repeatedly, at random times."""
    tally = Tally()
    world.reset(command)
    began = time.monotonic()
    world.run(command)
    longest = time.monotonic() - began
    while tally.kills < kills:
        world.reset(command)
        for _ in range(min(draw.randint(1, _MOST_IN_A_ROW), kills - tally.kills)):
            ran = world.run(command, then=partial(kill, after=draw.uniform(0.0, longest)))
            if ran.status != KILLED:
                break  # it was done before; no kill
            _look(tally, world, command, ran)
        _finish(tally, world, command)
    return tally


def kill_at_steps(world: World, command: str, *, stride: int = 1, sabotage: str = "") -> Tally:
    """Kill one command before its first step, then before a later one, until it ends before.

    With a wrong order of writing, which the harness is to see, nothing is run again.
    """
    tally, number = Tally(), 1
    while True:
        world.reset(command)
        env = {"ICM_TEST_STEP": str(number)}
        ran = world.run(command, sabotage=f"{sabotage} die_at_step", env=env)
        if ran.status != KILLED:
            return tally
        _look(tally, world, command, ran)
        if not sabotage:
            _finish(tally, world, command)
        number += stride


def kill(pid: int, *, after: float) -> None:
    """Kill a process after some seconds."""
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)


def _look(tally: Tally, world: World, command: str, ran: Run) -> None:
    """Check every promise after a kill."""
    left = world.leftovers()
    tally.kills += 1
    tally.acknowledged += sum(acknowledges(command, event) for event in ran.events)
    tally.orphans += left.orphans
    tally.temporary_files += left.temporary
    tally.uncommitted += left.uncommitted
    _note(tally, world.violations(command, ran.events))


def _finish(tally: Tally, world: World, command: str) -> None:
    """Run the same command to its end, then count and prune what the kills left."""
    ran = world.again(command)
    tally.reruns += 1
    _note(tally, world.ended_badly(command, ran))
    _note(tally, world.violations(command, ran.events, is_done=True))
    missed = world.missed(command)
    tally.goals_missed += len(missed)
    tally.examples += missed[: 5 - len(tally.examples)]
    tally.left_after_rerun += sum(astuple(world.leftovers()))
    world.prune()
    left = world.leftovers()
    tally.left_after_prune += sum(astuple(left))
    if any(astuple(left)):
        tally.examples.append(str(left))


def _note(tally: Tally, violations: list[str]) -> None:
    tally.violations += len(violations)
    tally.examples += violations[: max(0, 5 - len(tally.examples))]
