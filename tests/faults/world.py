"""The folders that the killed commands work on, and how their promises are checked."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from registry.store import Store
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import write_lora, write_mixed_fleet
from tests.faults.commands import COMMANDS, GENERATED, words
from tests.faults.goals import GOALS, End
from tests.faults.promises import acknowledges, has_a_copy, is_kept
from tests.faults.zygote import Run, Zygote
from tests.icmlora.tiny_base import write_tiny_base

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Leftovers:
    """What a killed command left beside what it promised: blobs without a row, and temporary files."""

    orphans: int
    temporary: int


class World:
    """The folders of one campaign.

    now/              the store that is worked on, and the output beside it
    before/COMMAND/   what `reset` puts there: where the command starts
    after/COMMAND/    what an undisturbed run of the command left there
    """

    def __init__(self, root: Path, zygote: Zygote, *, tasks: int = 5) -> None:
        self.root, self.zygote = root, zygote
        self.store, self.output = root / "now" / "store", root / "now" / "out"
        self._log = 0
        write_mixed_fleet(root / "loras")
        for number in range(tasks - 3):
            write_texts(write_lora(root / "loras" / f"more-{number}", seed=100 + number))
        write_lora(root / "later" / "extra", seed=9, rank=8, targets=("self_attn.k_proj",))
        write_texts(root / "later", f"{GENERATED}.jsonl", count=16)
        write_tiny_base(root / "base")

    @cached_property
    def version_one(self) -> str:
        """The digest of the generator that the first training leaves."""
        self._need_template("train")
        with Store.open(self.root / "after" / "train" / "store") as store:
            return store.generators.all()[0].blob

    def run(self, command: str, *, force: bool = False, **options: Any) -> Run:
        """Run a command as it would be typed; see `Zygote.run`."""
        return self.icm(COMMANDS[command].line + (" --force" if force else ""), **options)

    def again(self, command: str, **options: Any) -> Run:
        """Run a command as whoever sees what its killed run left.

        An output that was complete before the kill is not overwritten without --force, and need not be.
        """
        return self.run(command, force=COMMANDS[command].has_output and self.output.exists(), **options)

    def icm(self, line: str, **options: Any) -> Run:
        """Run one command line on the store that is worked on."""
        self._log += 1
        env = {"ICM_STORE": str(self.store), "ICM_LOCK_TIMEOUT": "10", **options.pop("env", {})}
        argv = [*words(line, self.root, self.output), "--json"]
        return self.zygote.run(argv, env=env, out=self.root / f"log-{self._log}", **options)

    def reset(self, command: str) -> None:
        """Put the starting state of a command in place."""
        self._need_template(command)
        shutil.rmtree(self.root / "now", ignore_errors=True)
        shutil.copytree(self.root / "before" / command, self.root / "now")

    def reference(self, command: str) -> Contents:
        """Return what an undisturbed run of a command wrote beside the store; the command was reset once."""
        return contents(self.root / "after" / command / "out")

    def violations(self, command: str, events: list[dict[str, Any]]) -> list[str]:
        """Return every promise that is broken after a kill; `events` is what the command had printed."""
        found = []
        acknowledged = [event for event in events if acknowledges(command, event)]
        if self.output.exists() and contents(self.output) != self.reference(command):
            found.append("the output is neither absent nor complete")
        if not self.output.exists():
            found += [f"{command}: written, and lost: {event}" for event in acknowledged if "output" in event]
        if not self._has_store():
            return [*found, *(f"{event} was acknowledged without a store" for event in acknowledged)]
        with Store.open(self.store) as store:
            problems = [finding for finding in store.verify(read_data=True) if finding.is_problem]
            found += [f"{finding.kind}: {finding.message}" for finding in problems]
            known = {task.name for task in store.tasks.all()}
            found += [f"{name} has neither original nor code" for name in known if not has_a_copy(store, name)]
            if GENERATED in known and not self.output.exists():
                found.append("a task was made before its folder")
            lost = [event for event in acknowledged if not is_kept(command, event, store)]
        return found + [f"{command}: acknowledged, and lost: {event}" for event in lost]

    def ended_badly(self, command: str, ran: Run) -> list[str]:
        """Return what is wrong with how a command that was not killed ended."""
        # A task that was registered before the kill is not made again: its name is taken. `missed` says if it is whole.
        is_there = command == "generate" and any(event.get("kind") == "task_conflict" for event in ran.events)
        return [] if ran.status == 0 or is_there else [f"the rerun ended with {ran.status}: {ran.lines[-1:]}"]

    def missed(self, command: str) -> list[str]:
        """Return what the command has not reached, after it ran to its end."""
        if self._has_store():
            names = {folder.name for folder in (self.root / "loras").iterdir()}
            with Store.open(self.store) as store:
                if GOALS[command](End(store, names, self.version_one, self._is_written(command))):
                    return []
        return [f"{command} did not reach its goal"]

    def leftovers(self) -> Leftovers:
        """Count what nobody refers to."""
        beside = len(list(self.output.parent.glob("out.icm-*")))
        if not self._has_store():
            return Leftovers(0, beside)
        with Store.open(self.store) as store:
            orphans = sum(finding.kind == "orphan" for finding in store.verify())
        temporary = [path for path in (self.store / "tmp").iterdir() if path.is_file()]
        return Leftovers(orphans, len(temporary) + beside)

    def prune(self) -> None:
        """Remove what nobody refers to, without the hour of grace."""
        with Store.open(self.store) as store:
            store.prune(grace=0)

    def _is_written(self, command: str) -> bool:
        return self.output.exists() and contents(self.output) == self.reference(command)

    def _has_store(self) -> bool:
        return (self.store / "FORMAT").exists()

    def _need_template(self, command: str) -> None:
        """Make the folders of a command, and first those of the commands that it starts from."""
        if (self.root / "after" / command).exists():
            return
        start = COMMANDS[command]
        for earlier in (start.after, *start.outputs_of):
            if earlier is not None:
                self._need_template(earlier)
        self._make_template(command)

    def _make_template(self, command: str) -> None:
        now, start = self.root / "now", COMMANDS[command]
        shutil.rmtree(now, ignore_errors=True)
        now.mkdir()
        if start.after is not None:
            shutil.copytree(self.root / "after" / start.after / "store", self.store)
        for line in start.first:
            self._complete(self.icm(line))
        shutil.copytree(now, self.root / "before" / command)
        self._complete(self.run(command))
        shutil.copytree(now, self.root / "after" / command)

    def _complete(self, ran: Run) -> None:
        assert ran.status == 0, ran.lines


def contents(output: Path) -> Contents:
    """Return the files of a folder by their paths in it, or the one file that the output is."""
    paths = output.rglob("*") if output.is_dir() else [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths if path.is_file()}
