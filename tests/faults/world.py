"""What the killed commands work on, what they promise, and how the promises are checked.

ingest       absent store          -> every task with its checkpoints
vectors      ingested store        -> every task with its vectors
train        store with vectors    -> a generator and a code per task
materialize  trained store         -> a folder with the very bytes of an undisturbed run
evict        trained store         -> no original, and of every task the code that was checked
update       evicted store, one task more with modules of its own -> the generator with one more epoch, and all codes
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icmlora.generator.lineage import Lineage
from registry.errors import DamagedStore
from registry.store import Store
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import write_lora, write_mixed_fleet
from tests.faults.zygote import Zygote
from tests.icmlora.tiny_base import LABEL, write_tiny_base

COMMANDS = ("ingest", "vectors", "train", "materialize", "evict", "update")
STEPS = 12
Contents = dict[str, bytes]


@dataclass(frozen=True)
class Leftovers:
    """What a killed command left beside what it promised: blobs without a row, and temporary files."""

    orphans: int
    temporary: int


class World:
    """The folders of one campaign. Templates are made once; `reset` gives a command its starting state again."""

    def __init__(self, root: Path, zygote: Zygote, *, tasks: int = 5) -> None:
        self.root, self.zygote = root, zygote
        self.store, self.output = root / "now" / "store", root / "now" / "out"
        self._log = 0
        write_mixed_fleet(root / "loras")
        for number in range(tasks - 3):
            write_texts(write_lora(root / "loras" / f"more-{number}", seed=100 + number))
        write_lora(root / "later" / "extra", seed=9, rank=8, targets=("self_attn.k_proj",))
        write_tiny_base(root / "base")
        self.version_one, self.reference = self._templates()

    def argv(self, command: str) -> list[object]:
        """Return the command line, which is the same every time."""
        more: dict[str, list[object]] = {
            "ingest": [self.root / "loras", "--no-vectors"],
            "vectors": ["--device", "cpu"],
            "train": ["--device", "cpu", "--steps", STEPS, "--no-eval"],
            "materialize": ["rules", "--source", "code", "-o", self.output],
            "evict": ["--max-error", "0.5"],
            "update": ["--update", "--device", "cpu", "--steps", STEPS, "--no-eval"],
        }
        return ["train" if command == "update" else command, *more[command], "--json"]

    def run(self, command: str, **options: Any) -> Any:
        """Run a command as it would be typed; see `Zygote.run`."""
        self._log += 1
        env = {"ICM_STORE": str(self.store), "ICM_LOCK_TIMEOUT": "10", **options.pop("env", {})}
        argv = self.argv(command) + (["--force"] if options.pop("force", False) else [])
        return self.zygote.run(argv, env=env, out=self.root / f"log-{self._log}", **options)

    def reset(self, command: str) -> None:
        """Put the starting state of a command in place."""
        shutil.rmtree(self.root / "now", ignore_errors=True)
        (self.root / "now").mkdir()
        template = self.root / f"before-{command}"
        if template.exists():
            shutil.copytree(template, self.store)

    def violations(self, command: str, events: list[dict[str, Any]]) -> list[str]:
        """Return every promise that is broken after a kill; `events` is what the command had acknowledged."""
        found = []
        if self.output.exists() and contents(self.output) != self.reference:
            found.append("the output folder is neither absent nor complete")
        if not (self.store / "FORMAT").exists():
            return [*found, *(f"{event} was acknowledged without a store" for event in events)]
        with Store.open(self.store) as store:
            problems = [finding for finding in store.verify(read_data=True) if finding.is_problem]
            found += [f"{finding.kind}: {finding.message}" for finding in problems]
            known = {task.name for task in store.tasks()}
            generators = {record.blob for record in store.generators()}
            found += [f"{name} has neither original nor code" for name in known if not _has_a_copy(store, name)]
            for event in events:
                kept = {
                    "task": lambda event=event: (
                        event["task"] in known
                        and (event["status"] != "evicted" or store.final_adapter(event["task"]).is_evicted)
                    ),
                    "vectors": lambda event=event: len(store.vectors(event["task"])) == event["vectors"],
                    "trained": lambda event=event: event["generator"] in generators,
                    "updated": lambda event=event: event["generator"] in generators,
                }.get(event.get("type", ""))
                if kept is not None and not kept():
                    found.append(f"{command}: acknowledged, and lost: {event}")
        return found

    def missed(self, command: str) -> list[str]:
        """Return what the command has not reached, after it ran to its end."""
        with Store.open(self.store) as store:
            rows = list(store.summaries())
            names = {folder.name for folder in (self.root / "loras").iterdir()}
            generator = store.current_generator(LABEL)
            first = [record.blob for record in store.generators() if record.version == 1]
        reached = {
            "ingest": {row.task.name for row in rows} == names
            and sum(row.checkpoints for row in rows) == 2
            and all(row.task.samples for row in rows if row.task.name != "silent"),
            "vectors": all(row.vectors for row in rows),
            "train": generator is not None and all(row.code for row in rows) and first == [self.version_one],
            "materialize": self.output.exists() and contents(self.output) == self.reference,
            "update": generator is not None and generator.version == 2 and all(row.code for row in rows),
            "evict": all(row.final.is_evicted and not row.checkpoints for row in rows) and not self._weights(),
        }
        return [] if reached[command] else [f"{command} did not reach its goal"]

    def leftovers(self) -> Leftovers:
        """Count what nobody refers to."""
        if not (self.store / "FORMAT").exists():
            return Leftovers(0, 0)
        with Store.open(self.store) as store:
            orphans = sum(finding.kind == "orphan" for finding in store.verify())
        temporary = [path for path in (self.store / "tmp").iterdir() if path.is_file()]
        return Leftovers(orphans, len(temporary) + len(list(self.output.parent.glob("out.icm-*"))))

    def prune(self) -> None:
        """Remove what nobody refers to, without the hour of grace."""
        with Store.open(self.store) as store:
            store.prune(grace=0)

    def _weights(self) -> list[str]:
        """Return the weights of evicted adapters whose file is still there."""
        with Store.open(self.store) as store:
            digests = {row.weights for row in store.evicted_adapters()}
            return [digest for digest in digests if store.paths.blob(digest).exists()]

    def _templates(self) -> tuple[str, Contents]:
        self.reset("ingest")
        for command in COMMANDS:
            if command == "update":
                self.zygote.run(
                    ["ingest", self.root / "later" / "extra", "--no-vectors"],
                    env={"ICM_STORE": str(self.store)},
                    out=self.root / "log-later",
                )
            if command != "ingest":
                shutil.copytree(self.store, self.root / f"before-{command}")
            ran = self.run(command)
            assert ran.status == 0, ran.lines
            if command == "ingest":
                with Store.open(self.store) as store:
                    store.set_base_alias(LABEL, str(self.root / "base"))
        with Store.open(self.store) as store:
            return store.generators()[0].blob, contents(self.output)


def _has_a_copy(store: Store, task: str) -> bool:
    """Say whether the adapter of a task can still be written, byte for byte or from its code."""
    final, generator = store.final_adapter(task), store.current_generator(LABEL)
    try:
        if not final.is_evicted:
            return store.read_blob(final.weights) != b""
        code = None if generator is None else store.code(task, generator.id)
        if generator is None or code is None:
            return False
        data = store.read_blob(code.blob)
        return bool(Lineage(store.read_blob(generator.blob)).codec_of(data).decode(data).modules)
    except DamagedStore:
        return False


def contents(folder: Path) -> Contents:
    """Return the files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
