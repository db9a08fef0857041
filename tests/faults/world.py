"""The folders that the killed commands work on, and how their promises are checked."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from registry.reachability import leftovers
from registry.store import Store
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import write_lora, write_mixed_fleet
from tests.faults.commands import COMMANDS, GENERATED, GONE, words
from tests.faults.goals import GOALS, End
from tests.faults.pairs import Pair
from tests.faults.promises import acknowledges, has_a_copy, is_kept
from tests.faults.zygote import Run, Zygote
from tests.icmlora.tiny_base import write_tiny_base

Contents = dict[str, bytes]
_EXPECTED = {"repair": {"database", "row", "unlisted"}, "copy": {"unlisted"}}
"""What `icm verify` finds until a command ends: an old database; states of another store, which have a past there."""


@dataclass(frozen=True)
class Leftovers:
    """Leftovers of a killed command: unreachable blobs, temporary files, uncommitted states."""

    orphans: int = 0
    temporary: int = 0
    uncommitted: int = 0


class World:
    """The folders of one campaign, and its store.

    now/              the output of commands, and the locations of base models
    before/COMMAND/   the starting state of the command, which `reset` restores
    after/COMMAND/    the state after an undisturbed run of the command
    laptop/           a trained store in a folder
    cache/            cached remote files; emptied after each kill

    The pair keeps the states of the store under the same names.
    """

    def __init__(self, root: Path, zygote: Zygote, pair: Pair, *, tasks: int = 5) -> None:
        self.root, self.zygote, self.pair = root, zygote, pair
        self.output = root / "now" / "out"
        self._log = 0
        write_mixed_fleet(root / "loras")
        for number in range(tasks - 3):
            write_texts(write_lora(root / "loras" / f"more-{number}", seed=100 + number))
        write_lora(root / "later" / "extra", seed=9, rank=8, targets=("self_attn.k_proj",))
        write_lora(root / "newer" / GONE, seed=50)
        write_texts(root / "later", f"{GENERATED}.jsonl", count=16)
        write_tiny_base(root / "base")

    @cached_property
    def version_one(self) -> str:
        """The digest of the generator that the first training leaves; `reset` has made it."""
        with Store.open(self.root / "laptop") as store:
            return store.generators()[0].blob

    def run(self, command: str, *, force: bool = False, **options: Any) -> Run:
        """Run a command as it would be typed; see `Zygote.run`."""
        return self.icm(COMMANDS[command].line + (" --force" if force else ""), **options)

    def again(self, command: str, **options: Any) -> Run:
        """Run a command as a user would after its killed run.

        An output that was complete before the kill is not overwritten without --force, and need not be.
        """
        return self.run(command, force=COMMANDS[command].has_output and self.output.exists(), **options)

    def icm(self, line: str, **options: Any) -> Run:
        """Run one command line on the store under test."""
        self._log += 1
        env = {"ICM_STORE": self.pair.address, "ICM_LOCK_TIMEOUT": "10", "XDG_CACHE_HOME": str(self._cache)}
        env |= {"XDG_STATE_HOME": str(self.root / "state"), "XDG_CONFIG_HOME": str(self.root / "now" / "config")}
        env |= self.pair.environment | options.pop("env", {})
        blobs = f"--blobs {self.pair.blobs}" if self.pair.blobs else ""
        argv = words(line, root=self.root, output=self.output, store=self.pair.address, blobs=blobs)
        return self.zygote.run([*argv, "--json"], env=env, out=self.root / f"log-{self._log}", **options)

    def reset(self, command: str) -> None:
        """Put the starting state of a command in place."""
        for needed in ("train", command):
            self._need_template(needed)
        shutil.rmtree(self.root / "now", ignore_errors=True)
        shutil.copytree(self.root / "before" / command, self.root / "now")
        self.pair.put_back(f"before {command}")

    def reference(self, command: str) -> Contents:
        """Return the files that an undisturbed run of a command wrote outside the store; the command was reset once."""
        return contents(self.root / "after" / command / "out")

    def violations(self, command: str, events: list[dict[str, Any]], *, is_done: bool = False) -> list[str]:
        """Return every promise that is broken after a kill; `events` is the output of the command.

        Everything is read from where the store has it.
        """
        shutil.rmtree(self._cache, ignore_errors=True)
        found = []
        acknowledged = [event for event in events if acknowledges(command, event)]
        if self.output.exists() and contents(self.output) != self.reference(command):
            found.append("the output is neither absent nor complete")
        if not self.output.exists():
            found += [f"{command}: written, and lost: {event}" for event in acknowledged if "output" in event]
        if not self.pair.exists():
            return [*found, *(f"{event} was acknowledged without a store" for event in acknowledged)]
        with self.pair.open() as store:
            expected = () if is_done else _EXPECTED.get(command, ())
            problems = [one for one in store.verify(read_data=True) if one.is_problem and one.kind not in expected]
            found += [f"{finding.kind}: {finding.message}" for finding in problems]
            known = store.names()
            found += [f"{name} has neither original nor code" for name in known if not has_a_copy(store, name)]
            if GENERATED in known and COMMANDS[command].has_output and not self.output.exists():
                found.append("a task was made before its folder")
            lost = [event for event in acknowledged if not is_kept(command, event, store)]
        return found + [f"{command}: acknowledged, and lost: {event}" for event in lost]

    def ended_badly(self, command: str, ran: Run) -> list[str]:
        """Return the errors in the exit of a command that was not killed."""
        # A rerun skips work done before the kill; `missed` checks that it is complete.
        done = COMMANDS[command].is_done
        is_there = bool(done) and any(event.get("kind") == done for event in ran.events)
        return [] if ran.status == 0 or is_there else [f"the rerun ended with {ran.status}: {ran.lines[-1:]}"]

    def missed(self, command: str) -> list[str]:
        """Return the goals that the command missed, after it ran to its end."""
        if self.pair.exists():
            names = {folder.name for folder in (self.root / "loras").iterdir()}
            with self.pair.open() as store:
                is_located = any(self.output.parent.glob("config/icm/base_models.yaml"))
                if GOALS[command](End(store, names, self.version_one, is_located, self._is_written(command))):
                    return []
        return [f"{command} did not reach its goal"]

    def leftovers(self) -> Leftovers:
        """Count the leftovers."""
        beside = len([*self.output.parent.glob("out.icm-*"), *self.output.parent.glob("config/icm/*.tmp")])
        if not self.pair.exists():
            return Leftovers(temporary=beside)
        with self.pair.open() as store:
            kinds = Counter(finding.kind for finding in store.verify())
            return Leftovers(kinds["orphan"], len(leftovers(store)) + beside, kinds["uncommitted"])

    def prune(self) -> None:
        """Delete the leftovers, without the hour of grace."""
        with self.pair.open() as store:
            store.prune(grace=0)

    @property
    def _cache(self) -> Path:
        return self.root / "cache"

    def _is_written(self, command: str) -> bool:
        return self.output.exists() and contents(self.output) == self.reference(command)

    def _need_template(self, command: str) -> None:
        """Create the folders of a command, after the folders of the commands that it starts from."""
        if (self.root / "after" / command).exists():
            return
        start = COMMANDS[command]
        for earlier in (self._start_of(command), *start.outputs_of):
            if earlier is not None:
                self._need_template(earlier)
        self._make_template(command)

    def _make_template(self, command: str) -> None:
        now, start = self.root / "now", COMMANDS[command]
        shutil.rmtree(now, ignore_errors=True)
        (now / "config").mkdir(parents=True)
        self.pair.clear()
        if (earlier := self._start_of(command)) is not None:
            self.pair.put_back(f"after {earlier}")
            shutil.copytree(self.root / "after" / earlier / "config", now / "config", dirs_exist_ok=True)
        for line in start.first:
            self._complete(self.icm(line))
        if start.old_database:
            self.pair.put_back(f"after {start.old_database}", only_database=True)
        shutil.copytree(now, self.root / "before" / command)
        self.pair.save(f"before {command}")
        self._complete(self.run(command))
        shutil.copytree(now, self.root / "after" / command)
        self.pair.save(f"after {command}")
        if command == "train":
            self._complete(self.icm("copy {store} {root}/laptop"))

    def _start_of(self, command: str) -> str | None:
        """Return the command that comes before, if one does."""
        after = COMMANDS[command].after
        return None if after == "init" and self.pair.is_plain else after

    def _complete(self, ran: Run) -> None:
        assert ran.status == 0, ran.lines


def contents(output: Path) -> Contents:
    """Return the files of a folder by their paths in it, or the one file that the output is."""
    paths = output.rglob("*") if output.is_dir() else [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths if path.is_file()}
