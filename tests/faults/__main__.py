"""The campaign on one pair of database and blob place: `python -m tests.faults --pair postgres+s3 --kills 20`.

It may take hours. Results are written after each step and added to earlier ones, so a run can be stopped at any time
and continued with another --seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tests.faults.campaign import kill_at_random, kill_at_steps
from tests.faults.commands import COMMANDS
from tests.faults.flips import BEFORE, Damages, believing, without_comparing
from tests.faults.pairs import PAIRS, Pair, servers
from tests.faults.sqlite_calls import ignoring_errors, is_reachable
from tests.faults.sweeps import Sweeps
from tests.faults.world import World
from tests.faults.zygote import Zygote
from tests.registry.writing import COMMANDS as SMALL

_RESULTS = Path("tests/benchmarks/results")
_TASKS, _STEP = 6, 100


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", choices=PAIRS, default=PAIRS[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--kills", type=int, default=20, help="kills of each command at random times")
    parser.add_argument("--kill-stride", type=int, default=10, help="kill before each n-th step of each command")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS], help="commands to kill")
    parser.add_argument("--small-kills", type=int, default=40, help="kills of each small command of the registry")
    parser.add_argument("--control-kills", type=int, default=60, help="kills of each command that writes wrongly")
    parser.add_argument("--power-losses", type=int, default=200, help="power losses during each small command")
    parser.add_argument("--database-flips", type=int, default=5000, help="flips of bits in registry.db")
    parser.add_argument("--flips", type=int, default=100, help="flips of bits in files of each other kind")
    parser.add_argument("--losses", type=int, default=100, help="losses of the database of each kind")
    parser.add_argument("--crowds", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="processes that use a store")
    parser.add_argument("--crowd-seconds", type=float, default=60.0, help="for each number of processes")
    parser.add_argument("--stride", type=int, default=1, help="of calls, statements and requests, each n-th goes wrong")
    parser.add_argument(
        "--restarts", type=int, default=10, help="restarts of the database server during each small command"
    )
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--output", type=Path, help="by default faults-PAIR.json among the results")
    return parser.parse_args()


@dataclass
class Crowd:
    """The outcomes of the commands of many processes."""

    run: int
    unexpected: int
    longest_seconds: float
    examples: list[str]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.unexpected


class Campaign:
    """The campaign on one pair, part by part."""

    def __init__(self, chosen: argparse.Namespace, root: Path) -> None:
        self.chosen, self.root = chosen, root
        self.draw = random.Random(chosen.seed)
        (root / "servers").mkdir()

    def run(self, write: Callable[[str, Any], None]) -> list[str]:
        """Run the requested parts and write their results; return failures, and controls that were not caught."""
        is_clean = defaultdict[str, bool](lambda: True)
        with servers(self.root / "servers", (self.chosen.pair,)) as self.running:
            for part in self.chosen.parts:
                for name, found in PARTS[part](self):
                    write(name, asdict(found))
                    is_clean[name] &= found.is_clean
        return [name for name, clean in is_clean.items() if clean == name.startswith("control")]

    def kills(self) -> Iterator[tuple[str, Any]]:
        """Kill every command at random times."""
        with closing(Zygote()) as zygote:
            world = World(self._folder("kills"), zygote, self._pair("kills"), tasks=_TASKS)
            for command in self.chosen.commands:
                yield f"kills {command}", kill_at_random(world, command, self.chosen.kills, self.draw)

    def steps(self) -> Iterator[tuple[str, Any]]:
        """Kill every command before its steps, then one that writes wrongly."""
        with closing(Zygote()) as zygote:
            world = World(self._folder("steps"), zygote, self._pair("steps"), tasks=_TASKS)
            for command in self.chosen.commands:
                yield f"steps {command}", kill_at_steps(world, command, stride=self.chosen.kill_stride)
            yield "control refs_first", kill_at_steps(world, "ingest", stride=9, sabotage="refs_first")

    def small_kills(self) -> Iterator[tuple[str, Any]]:
        """Kill small commands of the registry, then those that write wrongly."""
        with closing(Zygote()) as zygote:
            sweeps = Sweeps(self._pair("small"), self._folder("small"))
            for name in SMALL:
                yield "small kills", sweeps.kills(zygote, [name], self.chosen.small_kills, self.draw)
            found = sweeps.kills(zygote, SMALL, self.chosen.control_kills, self.draw, "refs_first")
            yield "control refs_first of small commands", found

    def sweeps(self) -> Iterator[tuple[str, Any]]:
        """Make calls, statements and requests fail."""
        sweeps, stride = Sweeps(self._pair("sweeps"), self._folder("sweeps")), self.chosen.stride
        for name in SMALL:
            if self.chosen.pair.startswith("postgres"):
                yield "restarts", sweeps.restarts([name], self.chosen.restarts, self.draw)
                yield "statements", sweeps.statements([name], stride=stride)
            if self.chosen.pair.endswith("s3"):
                yield "requests", sweeps.requests([name], stride=stride)
            yield "calls", sweeps.calls([name], stride=stride)

    def sqlite(self) -> Iterator[tuple[str, Any]]:
        """Make calls of SQLite fail, where they can be intercepted."""
        if self.chosen.pair.startswith("postgres") or not is_reachable():
            return
        sweeps, stride = Sweeps(self._pair("sqlite"), self._folder("sqlite")), self.chosen.stride
        for name in SMALL:
            yield "calls of SQLite", sweeps.sqlite([name], stride=stride)
        with ignoring_errors():  # not of a prune, which retries until it succeeds
            yield "control ignoring errors of SQLite", sweeps.sqlite(["learn"], stride=61)

    def power_losses(self) -> Iterator[tuple[str, Any]]:
        """Simulate power losses of this machine."""
        sweeps, draw = Sweeps(self._pair("power"), self._folder("power")), self.draw
        for name in SMALL:
            if self.chosen.pair.endswith("folder") or self.chosen.pair.startswith("sqlite"):
                yield "power losses", sweeps.power_losses([name], self.chosen.power_losses, draw)
            if self.chosen.pair.endswith("folder"):
                yield (
                    "control without_sync",
                    sweeps.power_losses([name], self.chosen.control_kills, draw, "without_sync"),
                )

    def damages(self) -> Iterator[tuple[str, Any]]:
        """Flip bits of each kind of file, and lose the database."""
        damages = Damages(self._pair("damages"), self._folder("damages"))
        counts = {"registry.db": self.chosen.database_flips}
        counts |= {kind: self.chosen.losses for kind in damages.tries if "database" in kind}
        for kind in damages.tries:
            left = counts.get(kind, self.chosen.flips)
            while left > 0:
                yield f"damage of {kind}", damages.study(kind, min(left, _STEP), self.draw)
                left -= _STEP
        with believing():
            yield "control believing", damages.study("originals", self.chosen.flips, self.draw)
        with without_comparing():
            yield "control without_comparing", damages.study(BEFORE, 1, self.draw)

    def crowds(self) -> Iterator[tuple[str, Any]]:
        """Run more and more processes on one store."""
        pair, output = self._pair("crowd"), self._folder("crowd") / "figures.json"
        for workers in self.chosen.crowds:
            pair.clear()
            options = ["--seconds", str(self.chosen.crowd_seconds), "--workers", str(workers), "--output", str(output)]
            if not pair.is_plain:
                pair.make()
                options += ["--store", pair.address]
            subprocess.run([sys.executable, "-m", "tests.faults.crowd", *options], check=True)
            figures = json.loads(output.read_text())
            unexpected = sum(figures["unexpected"].values()) + (not figures["sound_in_the_end"])
            waits = [of["longest_seconds"] or 0.0 for of in figures["commands"].values()]
            examples = [*figures["unexpected"]][:5]
            yield f"crowd of {workers}", Crowd(figures["run"], unexpected, max(waits), examples)

    def _pair(self, part: str) -> Pair:
        return Pair(self.chosen.pair, self._folder(part), self.running)

    def _folder(self, part: str) -> Path:
        (self.root / part).mkdir(exist_ok=True)
        return self.root / part


PARTS: dict[str, Callable[[Campaign], Iterator[tuple[str, Any]]]] = {
    "kills": Campaign.kills,
    "steps": Campaign.steps,
    "small-kills": Campaign.small_kills,
    "sweeps": Campaign.sweeps,
    "sqlite": Campaign.sqlite,
    "power": Campaign.power_losses,
    "damages": Campaign.damages,
    "crowd": Campaign.crowds,
}


def _added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Add counts to an earlier run, and keep the first few examples."""
    return {name: (before.get(name, [] if isinstance(value, list) else 0) + value) for name, value in found.items()}


def _main() -> int:
    chosen = _arguments()
    output = chosen.output or _RESULTS / f"faults-{chosen.pair}.json"
    document = json.loads(output.read_text()) if output.exists() else {}
    document |= {
        "what": f"faults on {chosen.pair}, tests/faults",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seeds": [*document.get("seeds", []), chosen.seed],
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "torch": torch.__version__,
        },
        "tasks": _TASKS,
        "parts": document.get("parts", {}),
    }

    with tempfile.TemporaryDirectory() as folder:

        def write(name: str, found: Any) -> None:
            told = json.dumps(found).replace(folder, "ROOT")  # results name no folder of a machine
            sys.stderr.write(f"{name} {told}\n")
            document["parts"][name] = _added(document["parts"].get(name, {}), json.loads(told))
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(document, indent=2) + "\n")

        wrong = Campaign(chosen, Path(folder)).run(write)
    for name in wrong:
        sys.stderr.write(f"WRONG: {name}\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(_main())
