"""Flip single bits of a store's database and see who notices, and what is deleted: `python -m tests.faults.flips`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sqlite3
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from icmlora import Fleet
from icmlora.fleet.write.materialize import Source
from registry import row_checks, schema
from registry.errors import IcmError
from registry.records import NewEvaluation
from registry.storage import postgres_checks
from registry.storage.database import Database
from registry.storage.locks import Patience
from registry.storage.sqlite import SqliteDatabase
from registry.store import Store
from tests.cli.tiny_fleet import build_ingested, icm_quietly, train_store, write_lora
from tests.faults.pages import Place, places
from tests.faults.pairs import blobs_in

# What decides which bytes are written, deleted or let go of.
DECIDING = {
    "tasks": ["samples_id", "eval_id", "pinned", "base_model_id"],
    "adapters": ["task_id", "is_final", "weights_id", "config_id", "description_id", "evicted_at", "extra_count"],
    "extras": ["adapter_id", "file", "blob_id"],
    "codes": ["task_id", "generator_id", "adapter_id", "blob_id", "dw_error"],
    "generators": ["blob_id", "is_current", "start_id"],
    "evaluations": ["retained_gain", "created_at", "generator_id"],
}
_LIMIT = 0.05  # below the error of any code, so that nothing may go
_KEPT_BY_NOBODY = 0.99  # above the error of any code, so that all may go that is not pinned


@dataclass
class Tally:
    """What became of the flips of one column."""

    flips: int = 0
    without_effect: int = 0
    """Every row reads as before."""
    noticed: int = 0
    """By `icm verify`."""
    unnoticed: int = 0
    commands: int = 0
    refused: int = 0
    wrong_adapters: int = 0
    deleted: int = 0
    """Commands after which the store lacked a blob, or the user's folder its weights."""
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.unnoticed or self.wrong_adapters or self.deleted)

    def note(self, what: str) -> None:
        """Keep the first few bad ones."""
        if len(self.examples) < 3:
            self.examples.append(what)


class Flips:
    """A small store with a row in nearly every table, and copies of it with one bit changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.store = build(root), root / "flipped"
        self.path = self.source / "registry.db"
        self.data = self.path.read_bytes()
        self.rows = rows_of(self.path)
        self._copy(self.data)
        self._commands = Commands(self.store, root, lambda: blobs_in(self.store))

    def bits(self, wanted: Callable[[Place], bool]) -> Iterator[tuple[Place, int]]:
        """Yield the bits of chosen columns."""
        yield from ((place, bit) for place in places(self.path) if wanted(place) for bit in range(8))

    def study(self, bits: Iterable[tuple[Place, int]], *, commands: bool) -> dict[str, Tally]:
        """Flip bits one after the other; `commands` also runs those that delete and write."""
        tallies: defaultdict[str, Tally] = defaultdict(Tally)
        probe = self.root / "probe.db"
        for place, bit in bits:
            tally = tallies[f"{place.table}.{place.column}"]
            tally.flips += 1
            flipped = bytearray(self.data)
            flipped[place.offset] ^= 1 << bit
            probe.write_bytes(flipped)
            found = _is_noticed(probe)
            if not found and rows_of(probe) == self.rows:
                tally.without_effect += 1
                continue
            tally.noticed += found
            tally.unnoticed += not found
            if not found:
                tally.note(f"unnoticed: {place}, bit {bit}")
            if commands:
                self._copy(bytes(flipped))
                self._commands.run(tally, f"{place}, bit {bit}")
        return dict(tallies)

    def _copy(self, database: bytes) -> None:
        """Copy the store, but for its database."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.source, self.store, copy_function=os.link)
        (self.store / "registry.db").unlink()
        (self.store / "registry.db").write_bytes(database)


class Commands:
    """Commands that write or delete, on a store in which something may be wrong.

    Args:
        store: The address of one that `build` made, or of a copy; nothing is wrong with it yet.
        root: The folder in which it was built.
        blobs: Returns the names of all blobs that it has.
    """

    def __init__(self, store: str | Path, root: Path, blobs: Callable[[], set[str]]) -> None:
        self._store, self._loras, self._output, self._blobs = store, root / "loras", root / "out", blobs
        self._untouched = Path(shutil.copytree(self._loras, root / "untouched"))
        self._adapters = {row.task.name: written(store, row.task.name, self._output) for row in Fleet(store).tasks()}
        assert None not in self._adapters.values()

    def run(self, tally: Tally, what: str) -> None:
        """Run them one after the other, up to one that deletes what has to stay."""
        for name, adapter in self._adapters.items():
            tally.commands += 1
            made = written(self._store, name, self._output)
            if made is None:
                tally.refused += 1
            elif made != adapter:
                tally.wrong_adapters += 1
                tally.note(f"materialize {name} is wrong: {what}")
        before, fleet = self._kept(), Fleet(self._store)
        changing: dict[str, Callable[[], object]] = {
            "evict": lambda: fleet.evict(max_error=_LIMIT, device="cpu"),
            "evict a pinned one": lambda: fleet.evict(["silent"], max_error=_KEPT_BY_NOBODY, device="cpu"),
            "evict --placeholder": lambda: fleet.evict(max_error=_LIMIT, placeholder=True, device="cpu"),
            "evict --min-gain": lambda: fleet.evict(["rules"], min_gain=0.95, placeholder=True, device="cpu"),
            "prune": lambda: fleet.prune(grace=0, empty_quarantine=True),
        }
        for command, run in changing.items():
            tally.commands += 1
            try:
                run()
            except IcmError:
                tally.refused += 1
            if before - self._kept():
                tally.deleted += 1
                tally.note(f"{command} deleted: {what}")
                shutil.rmtree(self._loras)
                shutil.copytree(self._untouched, self._loras)
                break

    def _kept(self) -> set[str]:
        return self._blobs() | {str(path) for path in self._loras.rglob("*.safetensors")}


def written(store: str | Path, task: str, output: Path, source: Source = "auto") -> str | None:
    """Return a digest of what is written of a task, without its card; None if it is refused."""
    shutil.rmtree(output, ignore_errors=True)
    try:
        Fleet(store).materialize(task, output, source=source)
    except (IcmError, OSError, ValueError):  # the last two where wrong bytes were believed
        return None
    return digest_of_folder(output)


def digest_of_folder(folder: Path) -> str:
    """Return a digest of the files of an adapter, without its card."""
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def build(root: Path) -> Path:
    """Make the store: six tasks, of which four are evicted, one is pinned, and one has extras of each kind."""
    # Of the same form as `headed` and `poems`, and between them, so that a flip gives one the code of another.
    for seed, name in enumerate(("essays", "letters"), start=11):
        write_lora(root / "loras" / name, seed=seed)
    write_lora(root / "loras" / "headed", seed=5, bias="lora_only")
    (root / "loras" / "headed" / "tokenizer.json").write_text('{"version": "1.0"}')
    store = build_ingested(root, vectors=True)
    train_store(store)
    icm_quietly(store, "edit", "silent", "--pin")
    icm_quietly(store, "evict", "rules", "poems", "essays", "letters", "--max-error", _KEPT_BY_NOBODY)
    with Store.open(store) as opened:
        task, (generator,) = opened.tasks.get("rules"), opened.generators.all()
        assert task.eval_data is not None
        figures = {"value": 2.0, "count": 100, "utf8_bytes": 400, "retained_gain": 0.9, "squared_error": None}
        settings = {"settings": {"dtype": "float32"}, "data": task.eval_data}
        opened.evaluations.add([NewEvaluation("rules", "code", generator.id, **figures, **settings)])  # type: ignore[arg-type]
        opened.generators.set_start(generator.id, opened.blobs.put(b"start"))
    return store


def rows_of(path: Path) -> dict[str, list[Any]] | None:
    """Return everything that can be read of a database; None if some of it cannot."""
    try:
        with closing(sqlite3.connect(path)) as database:
            return {
                name: database.execute(f"SELECT *, typeof(crc) FROM {name}").fetchall()
                for name in row_checks.COLUMNS_OF
            }
    except (sqlite3.Error, UnicodeDecodeError):
        return None


def _is_noticed(path: Path) -> bool:
    try:
        return any(SqliteDatabase(path, read_only=True, patience=Patience(1)).damage())
    except IcmError:
        return True


@contextmanager
def checks_off() -> Iterator[None]:
    """Believe every row, as icm did before rows had checks: the control, which has to be caught."""
    with ExitStack() as patches:
        for module in (row_checks, schema, postgres_checks):
            patches.enter_context(mock.patch.object(module, "checked", lambda check, *row: check))
        patches.enter_context(mock.patch.object(Database, "_wrong_rows", return_value=()))
        yield


def decides(place: Place) -> bool:
    """Say whether a byte is of a column that decides."""
    return place.column in DECIDING.get(place.table, ())


def summed(tallies: dict[str, Tally]) -> Tally:
    """Add up what became of the flips of all columns."""
    total = Tally()
    for tally in tallies.values():
        for name, value in vars(tally).items():
            if name != "examples":
                setattr(total, name, getattr(total, name) + value)
        total.examples += tally.examples
    return total


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results/flips.json"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flips = Flips(Path(folder))
        every = flips.study(flips.bits(lambda place: True), commands=False)
        sys.stderr.write(f"{json.dumps(asdict(summed(every)))}\n")
        deciding = flips.study(flips.bits(decides), commands=True)
        sys.stderr.write(f"{json.dumps(asdict(summed(deciding)))}\n")
        with checks_off():
            control = flips.study(list(flips.bits(decides))[::7], commands=True)
    document = {
        "what": "one bit of registry.db flipped at a time, tests/faults/flips.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "sqlite": sqlite3.sqlite_version,
        "every_bit_of_every_row": {**asdict(summed(every)), "by_column": {k: asdict(v) for k, v in every.items()}},
        "with_commands": {**asdict(summed(deciding)), "by_column": {k: asdict(v) for k, v in deciding.items()}},
        "control": {"what": "every seventh of them, with the checks of rows switched off", **asdict(summed(control))},
    }
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    _main()
