"""Damage a store, use it, repair it: flip bits in each kind of file, and lose the database.

    damage ──▶ commands work, or report the damage ──▶ icm verify --repair ──▶ every task as before

No command in between deletes a task, swaps its adapter, or hides it permanently. Damaged files that are too large to
correct are reported, and the hint of `icm verify` restores them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from icm_cli.app import run
from icmlora import Bundle
from icmlora.bundle.file import BundleFile, open_bundle
from icmlora.fleet.resources import loading
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.io.files import read_exactly
from registry import reachability
from registry.encoding import files_of, unpacked
from registry.errors import IcmError
from registry.manifests import File, Run, Task
from registry.storage.blobs.content import Blobs
from registry.store import Store
from registry.verify import MAX_REPAIRED_BYTES
from tests.cli.tiny_fleet import build_ingested, train_store, write_lora
from tests.faults.pairs import Pair
from tests.icmlora.tiny_base import LABEL

_WORK = {
    "ls": "ls",
    "stats": "stats",
    "show": "show rules",
    "log": "log rules",
    "prune": "prune --yes --older-than 0s",
    "edited": "edit silent essays rules --note seen",
    "ingested": "ingest {loras}/plain --no-vectors",
    "encoded": "encode plain --refine 0",
    "evicted": "evict spare --max-error 0.99",
    "removed": "rm gone --yes",
    "prune again": "prune --yes --older-than 0s",
}
"""The command lines between damage and repair."""
_ACKNOWLEDGED: dict[str, Callable[[Store], bool]] = {
    "edited": lambda store: store.task("silent").note == "seen",
    "encoded": lambda store: store.task("plain").code is not None,
    "evicted": lambda store: store.task("spare").final.is_evicted,
    "removed": lambda store: store.find("gone") is None,
}
"""Conditions after the repair if the command succeeded."""
BEFORE = "database from before"
_SURE = 0.9
_HEADED = ("adapter_model.safetensors", "adapter_config.json")


@dataclass
class Tally:
    """The results of many damages."""

    damages: int = 0
    without_effect: int = 0
    """Nothing had to be repaired."""
    commands: int = 0
    refused: int = 0
    """Commands that ended with an error of icm."""
    unclear: int = 0
    """Commands that ended with an error that icm does not expect."""
    wrong: int = 0
    """The written adapter was not the adapter of the task."""
    lost: int = 0
    """After the repair, a task was not as before, or an acknowledged fact was missing."""
    named: int = 0
    """Files too large to correct; their tasks were named, and restored from the original."""
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.unclear or self.wrong or self.lost)

    def note(self, kind: str, what: str) -> None:
        """Count something bad, and keep the first few."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples) < 5:
            self.examples.append(f"{kind}: {what}")


class Damages:
    """A store on a pair, which is damaged repeatedly.

    poems, silent    with checkpoints, a card, texts and vectors; without texts
    rules            two versions, each with a code
    headed           a bias and a tokenizer next to its LoRA
    essays           evicted, with a placeholder in its folder
    large            weights that are too large to correct
    plain            without a code, until `icm encode plain`
    spare, gone      are evicted and removed

    Args:
        pair: The pair; it has no store yet.
        root: The folder of the pair.
    """

    def __init__(self, pair: Pair, root: Path) -> None:
        self.pair, self.root = pair, root
        self._home = root if pair.is_plain else root / "local"
        self._environment = {
            "ICM_STORE": pair.address,
            "ICM_LOCK_TIMEOUT": "10",
            **{f"XDG_{name}_HOME": str(root / name.lower()) for name in ("CONFIG", "CACHE", "STATE")},
        }
        self._said = ""
        with mock.patch.dict(os.environ, self._environment):
            self._build()
        pair.save("right")
        self.states = self._states()
        self.names = sorted({name.partition("@")[0] for name in self.states if "@" in name} | {"gone"})
        self._right = {name: {self._written(name)} for name in self.names}
        self._right["spare"].add(self._written("spare", "--source code"))
        if not pair.is_plain:
            self._right["essays"].add(self._before["essays"])
        assert all(None not in digests for digests in self._right.values())
        self.bundle = root / "fleet.icm"
        assert self.icm(f"export {self.bundle}") == 0, self._said
        self._bundled = _contents_of(self.bundle)
        self._restored = self._restore()
        self.files = self._files()
        tries = self._bundle, self._placeholder, self._folder
        self.tries: dict[str, Callable[[str, random.Random, Tally], None]] = {
            **dict.fromkeys(self.files, self._flip),
            **dict.fromkeys(self._losses(), self._lose),
            **{one.__name__.strip("_"): one for one in tries},
        }
        """Kind of damage -> function that applies it and checks the result."""

    def study(self, kind: str, count: int, draw: random.Random) -> Tally:
        """Apply one kind of damage repeatedly."""
        tally = Tally()
        for _ in range(count):
            tally.damages += 1
            self.tries[kind](kind, draw, tally)
        return tally

    def icm(self, line: str, tally: Tally | None = None, what: str = "") -> int:
        """Run a command line in this process and return its exit code."""
        words = [word.format(loras=self._home / "loras", newer=self.root / "newer") for word in line.split()]
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self._environment),
            mock.patch.object(loading, "SeedSearch", partial(SeedSearch, (42,))),  # all seeds take most of the time
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = int(run([*words, "--json"]))
        self._said, lines = out.getvalue(), err.getvalue().splitlines()
        errors = [error for error in map(json.loads, lines) if error.get("type") == "error"]
        if tally is not None:
            tally.commands += 1
            tally.refused += bool(errors)
            if any(error["kind"] == "unexpected" for error in errors):
                tally.note("unclear", f"{line}: {errors[0]['message']}; {what}")
        return code

    def _flip(self, kind: str, draw: random.Random, tally: Tally) -> None:
        """Flip one bit of a file of the store."""
        name = draw.choice(self.files[kind])
        data = bytearray(self._read(name))
        at, bit = draw.randrange(len(data)), draw.randrange(8)
        data[at] ^= 1 << bit
        self._write(name, bytes(data))
        self._look(draw, tally, f"byte {at} of {len(data)}, bit {bit}, of {name}")

    def _losses(self) -> list[str]:
        names = [BEFORE, "database without rows"]
        return names if self.pair.postgres else [*names, "no database", "database cut off"]

    def _lose(self, kind: str, draw: random.Random, tally: Tally) -> None:
        """Lose the database, or a part of it."""
        path = self.pair.folder / "registry.db"
        if kind == BEFORE:
            self.pair.put_back(BEFORE, only_database=True)
        elif kind == "database without rows":
            self.pair.execute("DELETE FROM refs", "DELETE FROM history")
        elif kind == "no database":
            path.unlink()
        else:
            os.truncate(path, draw.randrange(path.stat().st_size))
        self._look(draw, tally, kind)

    def _look(self, draw: random.Random, tally: Tally, what: str) -> None:
        """Use a damaged store, repair it, and check that every task is as before.

        Most bits of a database mean nothing: if nothing is wrong at first, most of this is skipped nine times of ten.
        """
        if draw.random() < 0.5:  # else remote files may be read from the cache
            shutil.rmtree(self.root / "cache", ignore_errors=True)
        is_sure = "registry.db" in what and draw.random() < _SURE
        if is_sure and self.icm("verify --read-data", tally, what) == 0:
            tally.without_effect += 1
            if self._states() != self.states:
                tally.note("lost", f"not noticed: {what}")
            self.pair.put_back("right")
            return
        for name in self.names:
            self._compare(name, tally, what)
        path = self.root / "again.icm"
        is_whole = self.icm(f"export {path} --force", tally, what) == 0
        if is_whole and what != BEFORE and not _contents_of(path) <= self._bundled:
            tally.note("wrong", f"export: {what}")
        done = [name for name, line in _WORK.items() if self.icm(line, tally, what) == 0]
        for name in ("FORMAT", "BLOBS", "owner"):  # the hint contains the right text
            if name in self.files:
                self._write(name, self._kept[name])
        self.icm("verify --repair --yes", tally, what)
        repair = json.loads(self._said or "{}")
        tally.without_effect += not (repair.get("rebuilt") or repair.get("repaired"))
        if self.icm("verify --read-data") != 0:
            tasks = {task for finding in json.loads(self._said)["findings"] for task in finding["tasks"]}
            tally.named += tasks == {"large"}
            self.icm("ingest {loras}/large --no-vectors", tally, what)
        if self.icm("verify --read-data") != 0:
            tally.note("lost", f"{self._said[:300]}: {what}")
        elif (now := self._states()) != self.states:
            odd = sorted(name for name in {**now, **self.states} if now.get(name) != self.states.get(name))
            tally.note("lost", f"{odd}: {what}")
        else:
            with self.pair.open() as store:
                gone = [name for name in done if name in _ACKNOWLEDGED and not _ACKNOWLEDGED[name](store)]
            if gone:
                tally.note("lost", f"{gone} of {done}: {what}")
        left = [name for name in self.names if name != "gone"]
        for name in draw.sample(left, 2) if "bit" in what else left:  # `verify` has hashed all files
            self._compare(name, tally, what, is_repaired=True)
        self.pair.put_back("right")

    def _compare(self, name: str, tally: Tally, what: str, *, is_repaired: bool = False) -> None:
        found = self._written(name, tally=tally, what=what)
        if not is_repaired and (found is None or (what == BEFORE and found == self._before.get(name))):
            return
        if found not in self._right[name]:
            tally.note("wrong", f"materialize {name}{' after the repair' * is_repaired}: {what}")

    def _bundle(self, kind: str, draw: random.Random, tally: Tally) -> None:
        """Flip one bit of a bundle: its import fails, and adapters written from it are correct."""
        path, taken = Path(shutil.copy(self.bundle, self.root / "flipped.icm")), self.root / "taken"
        what, name = flip(path, draw), draw.choice(sorted(self._bundled))[0]
        shutil.rmtree(taken, ignore_errors=True)
        if self.icm(f"--store {taken} import {path}", tally, what) == 0:
            tally.note("wrong", f"import: {what}")
        if self._from_bundle(path, name) not in (None, self._from_bundle(self.bundle, name)):
            tally.note("wrong", f"{name} of the bundle: {what}")

    def _from_bundle(self, path: Path, name: str) -> str | None:
        shutil.rmtree(self.root / "out", ignore_errors=True)
        try:
            Bundle(path).materialize(name, self.root / "out")
        except (IcmError, OSError, ValueError):  # the last two if wrong bytes were trusted
            return None
        return digest_of_folder(self.root / "out")

    def _placeholder(self, kind: str, draw: random.Random, tally: Tally) -> None:
        """Flip one bit of a placeholder. Only its text for users, and the sizes in it, may be wrong."""
        what: list[str] = []
        found = self._restore(lambda folder: what.append(flip(folder / PLACEHOLDER_NAME, draw)), tally)
        if found not in (None, self._restored):
            tally.note("wrong", f"restore: {what[0]}")

    def _restore(self, change: Callable[[Path], object] = bool, tally: Tally | None = None) -> str | None:
        """Restore a copy of the folder with a placeholder; None if that is refused and leaves the folder as it was."""
        folder = self.root / "essays"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._home / "loras" / "essays", folder)
        change(folder)
        before = digest_of_folder(folder)
        if self.icm(f"restore {folder}", tally) == 0 or digest_of_folder(folder) != before:
            return digest_of_folder(folder)
        return None

    def _folder(self, kind: str, draw: random.Random, tally: Tally) -> None:
        """Flip one bit of an adapter in the user's folder: a placeholder does not replace it."""
        folder, kept = self._home / "loras" / "headed", self.root / "headed"
        shutil.copytree(folder, kept)
        what = flip(folder / draw.choice(_HEADED), draw)
        before = digest_of_folder(folder)
        self.icm("evict headed --max-error 0.99 --placeholder", tally, what)
        if digest_of_folder(folder) != before:
            tally.note("lost", f"evict --placeholder: {what}")
        shutil.rmtree(folder)
        kept.rename(folder)
        self.pair.put_back("right")

    def _written(self, name: str, options: str = "", **noted: Any) -> str | None:
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        code = self.icm(f"materialize {name} -o {out} {options}", **noted)
        return digest_of_folder(out) if code == 0 else None

    def _states(self) -> dict[str, object]:
        """Return all records of all tasks, except fields that the commands change."""
        with self.pair.open() as store:
            versions = [one for name in store.names() for one in store.history(name) if name != "gone"]
            is_remote = store.blobs.is_remote
            return {
                **{f"{one.name}@{one.version}": _plain(one, is_remote) for one in versions},
                "generators": [one.blob for one in store.generators()],
                "run": replace(store.run(LABEL), seq=0),  # type: ignore[type-var]
                "base models": [one.names for one in store.base_models()],
            }

    def _files(self) -> dict[str, list[str]]:
        """Return the files by kind; files in the store folder are not empty."""
        kinds, names = defaultdict[str, set[str]](set), self.pair.files()
        for name in names:
            if name.startswith("manifests/"):
                body = unpacked(self.pair.read(name))
                kinds[f"manifests of {body['type'].split('/')[0]}"].add(name)
                for use, file in files_of(body):
                    use = f"large {use}" if file.size > MAX_REPAIRED_BYTES else use
                    kinds["shared documents" if use == "manifests" else use].add(f"blobs/{file[0]}/{file}")
        own = sorted(path for path in self.pair.folder.glob("*") if path.is_file() and path.stat().st_size)
        self._kept = {path.name: path.read_bytes() for path in own}
        for path in own:
            kinds["lock files" if path.name.startswith("lock") else path.name].add(path.name)
        return {kind: sorted(found & {*names, *self._kept}) for kind, found in sorted(kinds.items())}

    def _read(self, name: str) -> bytes:
        return self.pair.read(name) if "/" in name else (self.pair.folder / name).read_bytes()

    def _write(self, name: str, data: bytes) -> None:
        if "/" in name:
            self.pair.write(name, data)
        else:
            overwrite(self.pair.folder / name, data)

    def _build(self) -> None:
        loras = self._home / "loras"
        write_lora(loras / "headed", seed=5, bias="lora_only")
        (loras / "headed" / "tokenizer.json").write_text('{"version": "1.0"}')
        for seed, name in enumerate(("spare", "gone", "former"), start=11):
            write_lora(loras / name, seed=seed)
        write_lora(loras / "large", seed=15, rank=96)
        write_lora(self.root / "newer" / "rules", seed=50)
        local = build_ingested(self._home, vectors=True)
        train_store(local)
        if not self.pair.is_plain:
            self.pair.make()
            self._do(f"--store {local} copy {local} {self.pair.address}")
        write_lora(loras / "essays", seed=14)
        self._do("encode rules --max-error 0.1")
        self._do("ingest {loras}/essays --no-vectors")
        self.pair.save(BEFORE)
        self._before = {name: self._written(name) for name in ("rules", "essays")}
        """The content of an old database; evicted bytes stay for a day in remote storage."""
        write_lora(loras / "plain", seed=16)
        for line in (
            "encode essays --max-error 0.7",
            "ingest {newer}/rules --on-conflict version --no-vectors",
            "encode rules --max-error 0.7",
            "evict essays --max-error 0.99 --placeholder",
            "ingest {loras}/plain --no-vectors",
            "edit silent --tag kept",
            "rm former --yes",
        ):
            self._do(line)
        with self.pair.open() as store:
            files = [File(store.blobs.put(data), len(data)) for data in (b"start", b"step 3")]
            store.update_generator(LABEL, lambda one: replace(one, start=files[0]))  # type: ignore[type-var]
            store.save_run(Run(base_model=LABEL, config={}, weights=files[1]))

    def _do(self, line: str) -> None:
        assert self.icm(line) == 0, (line, self._said)


def _plain(task: Task, is_remote: bool) -> Task:
    """Return a task without the fields that the commands change."""
    task = replace(task, seq=0, parent=None, note=None)
    if task.name == "essays" and is_remote:  # its original stays for a day
        return replace(task, code=None, final=replace(task.final, evicted_at=None))
    if task.name == "silent":
        return replace(task, tags=())
    if task.name == "spare":
        return replace(task, final=replace(task.final, evicted_at=None))
    if task.name == "plain":  # it is ingested again if the database does not know it
        return replace(task, code=None, created_at="", final=replace(task.final, created_at=""))
    return task


def _contents_of(bundle: Path) -> set[tuple[object, ...]]:
    with open_bundle(bundle) as opened:
        tasks = opened.index.tasks
        return {(one.name, one.final.weights, one.final.config, one.code and str(one.code.blob)) for one in tasks}


def digest_of_folder(folder: Path) -> str:
    """Return a digest of the files of an adapter, without its card."""
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def flip(path: Path, draw: random.Random) -> str:
    """Flip one bit of a file and return which one."""
    data = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    data[at] ^= 1 << bit
    overwrite(path, bytes(data))
    return f"byte {at} of {len(data)}, bit {bit}, of {path.name}"


def overwrite(path: Path, data: bytes) -> None:
    """Replace the bytes of a file, which may be read-only."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextmanager
def believing() -> Iterator[None]:
    """Trust the bytes of all blobs, manifests and parts of bundles: a control, which must be caught."""

    def read_blob(self: Blobs, digest: str) -> bytes:
        with self._backend.get(digest) as file:
            return file.read()

    def read_part(self: BundleFile, digest: str) -> bytes:
        return read_exactly(self._descriptor, *self._places[digest])

    with ExitStack() as patches:
        for owner, name, method in (
            (Blobs, "read", read_blob),
            (Blobs, "is_intact", lambda self, digest: True),
            (BundleFile, "read", read_part),
            (BundleFile, "check", lambda self: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, method))
        yield


@contextmanager
def without_comparing() -> Iterator[None]:
    """Prune everything that the database does not name, without comparing it with the manifests: another control."""

    def sort(found: reachability.Walk, rest: dict[Any, list[reachability.FoundState]], *known: Any) -> None:
        found.garbage += [one for states in rest.values() for one in states]

    with (
        mock.patch.object(reachability, "_sort", sort),
        mock.patch.object(reachability.Walk, "check"),
    ):
        yield
