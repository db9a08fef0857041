"""Flip single bits in each kind of file and see who notices, and what is lost: `python -m tests.faults.file_flips`."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select

from icmlora import Bundle, Fleet
from icmlora.bundle.file import BundleFile
from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME
from icmlora.io.files import read_exactly
from registry.errors import IcmError
from registry.schema import Blob
from registry.storage.blobs.content import Blobs
from registry.storage.prune import BLOB_COLUMNS
from registry.store import Store
from tests.cli.tiny_fleet import build_ingested, icm_quietly, train_store, write_lora
from tests.faults.flips import Tally, digest_of_folder, rows_of, summed, written

_MAY_GO = 0.99  # above the error of any code, so that every original may go
_OF_HEADED = ("adapter_model.safetensors", "adapter_config.json")


class FileFlips:
    """A small store, the files beside it, and copies of them with one bit changed.

    poems, silent   their originals are there; poems has checkpoints, a card and texts
    rules           the same, with a finer code
    headed          the same, with a bias and a tokenizer beside its LoRA
    essays          evicted, with a placeholder in its folder, which also stands for a tokenizer
    """

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.store = root, build(root), root / "flipped"
        self.names = [row.task.name for row in Fleet(self.source).tasks()]
        self.adapters = {name: self._written(self.source, name) for name in self.names}
        self.bundle = root / "fleet.icm"
        Fleet(self.source).export_bundle(self.bundle)
        self.bundled = {name: self._from_bundle(self.bundle, name) for name in self.names}
        self.originals, self.blobs = _blobs_of(self.source)
        self.decoded = self._decoded()
        self.restored = self._restored()
        self.kept = self._kept()
        self._tries: dict[str, Callable[[random.Random, Tally], None]] = {
            "bundle": self._try_bundle,
            "placeholder": self._try_placeholder,
            "folder of an adapter": self._try_folder,
            "registry.db.kept": self._try_kept,
        }
        self.kinds = [*self.blobs, "FORMAT", *self._tries]

    def study(self, kinds: Iterable[str], *, each: int) -> dict[str, Tally]:
        """Flip `each` bits in files of each kind; they are the same ones every time."""
        tallies: defaultdict[str, Tally] = defaultdict(Tally)
        for kind in kinds:
            draw, tally = random.Random(kind), tallies[kind]
            for _ in range(each):
                tally.flips += 1
                if kind in self._tries:
                    self._tries[kind](draw, tally)
                else:
                    self._try_store(draw.choice(self.blobs.get(kind, [Path(kind)])), draw, tally)
        return dict(tallies)

    def _try_store(self, file: Path, draw: random.Random, tally: Tally) -> None:
        """Damage one file of the store; then look for it, write everything, and run what deletes."""
        what, fleet = flip(_copied(self.source, self.store) / file, draw), Fleet(self.store)
        _tell(tally, _is_found(fleet), what)
        for name in self.names:
            self._compare(tally, self._written(self.store, name), self.adapters[name], f"materialize {name}: {what}")
        self._compare(tally, self._exported(fleet), self.bundle.read_bytes(), f"export: {what}")
        before = set((self.store / "blobs").rglob("*"))
        _done(tally, lambda: fleet.prune(grace=0, empty_quarantine=True))
        if before - set((self.store / "blobs").rglob("*")):
            _lost(tally, f"prune: {what}")
        _done(tally, lambda: fleet.evict(max_error=_MAY_GO, device="cpu"))
        for name, original in self.originals.items():
            is_gone = not (self.store / original).exists()
            if is_gone and self._written(self.store, name) != self.decoded[name]:
                _lost(tally, f"evict {name}: {what}")

    def _try_bundle(self, draw: random.Random, tally: Tally) -> None:
        path, taken = Path(shutil.copy(self.bundle, self.root / "flipped.icm")), self.root / "taken"
        what = flip(path, draw)
        shutil.rmtree(taken, ignore_errors=True)
        _tell(tally, not _done(Tally(), lambda: Fleet(taken).import_bundle(path)), what)
        for name in self.names:
            self._compare(tally, self._from_bundle(path, name), self.bundled[name], f"{name} of the bundle: {what}")

    def _try_placeholder(self, draw: random.Random, tally: Tally) -> None:
        """Restore from a damaged placeholder. Only its words for people, and the sizes in it, may be wrong."""
        folder = _copied(self.root / "loras" / "essays", self.root / "essays")
        what, before = flip(folder / PLACEHOLDER_NAME, draw), _contents(folder)
        if not _done(tally, lambda: Fleet(self.source).restore([folder])):
            tally.noticed += 1
            if _contents(folder) != before:
                _lost(tally, f"a restore that was refused: {what}")
        else:
            tally.without_effect += 1
            self._compare(tally, digest_of_folder(folder), self.restored, f"restore: {what}")

    def _try_folder(self, draw: random.Random, tally: Tally) -> None:
        """Damage a file of the user's: it is nothing that a placeholder may replace."""
        _copied(self.source, self.store)
        folder = _copied(self.root / "ingested" / "headed", self.root / "loras" / "headed")
        what, fleet = flip(folder / draw.choice(_OF_HEADED), draw), Fleet(self.store)
        before = _contents(folder)
        _done(tally, lambda: fleet.evict(["headed"], max_error=_MAY_GO, placeholder=True, device="cpu"))
        if _contents(folder) == before:
            tally.noticed += 1
        else:
            _lost(tally, f"evict --placeholder: {what}")

    def _try_kept(self, draw: random.Random, tally: Tally) -> None:
        """Damage the copy of a database that is damaged too: it may not take its place."""
        database = _copied(self.source, self.store) / "registry.db"
        what = flip(self.store / "registry.db.kept", draw)
        database.write_bytes(b"nothing")
        if _done(tally, Fleet(self.store).restore_database):
            tally.without_effect += 1
            self._compare(tally, rows_of(database), self.kept, f"verify --restore-database: {what}")
        else:
            _tell(tally, database.read_bytes() == b"nothing", what)

    def _compare(self, tally: Tally, found: object, right: object, what: str) -> None:
        tally.commands += 1
        if found is None:
            tally.refused += 1
        elif found != right:
            tally.wrong_adapters += 1
            tally.note(f"wrong, {what}")

    def _written(self, store: Path, task: str) -> str | None:
        return written(store, task, self.root / "out")

    def _exported(self, fleet: Fleet) -> bytes | None:
        """Return the bundle of a store; None where not all tasks could be put into it."""
        path = self.root / "again.icm"
        try:
            report = fleet.export_bundle(path, force=True)
        except IcmError:
            return None
        return None if report.damaged else path.read_bytes()

    def _from_bundle(self, path: Path, task: str) -> str | None:
        shutil.rmtree(self.root / "out", ignore_errors=True)
        try:
            Bundle(path).materialize(task, self.root / "out")
        except (IcmError, OSError, ValueError):  # as in `written`
            return None
        return digest_of_folder(self.root / "out")

    def _decoded(self) -> dict[str, str | None]:
        """Return what is written of each task once its original is gone."""
        _copied(self.source, self.store)
        Fleet(self.store).evict(max_error=_MAY_GO, device="cpu")
        assert not any((self.store / original).exists() for original in self.originals.values())
        return {name: self._written(self.store, name) for name in self.names}

    def _restored(self) -> str:
        folder = _copied(self.root / "loras" / "essays", self.root / "essays")
        Fleet(self.source).restore([folder])
        return digest_of_folder(folder)

    def _kept(self) -> Any:
        database = self.root / "kept.db"
        database.write_bytes(zlib.decompress((self.source / "registry.db.kept").read_bytes()))
        return rows_of(database)


def build(root: Path) -> Path:
    """Make the store that is described above."""
    write_lora(root / "loras" / "headed", seed=5, bias="lora_only")
    write_lora(root / "loras" / "essays", seed=11)
    for name in ("headed", "essays"):
        (root / "loras" / name / "tokenizer.json").write_text('{"version": "1.0"}')
    store = build_ingested(root, vectors=True)
    shutil.copytree(root / "loras", root / "ingested")
    train_store(store)
    icm_quietly(store, "encode", "rules", "--max-error", "0.1")
    icm_quietly(store, "evict", "essays", "--max-error", _MAY_GO, "--placeholder")
    with Store.open(store) as opened:
        opened.generators.set_start(opened.generators.all()[0].id, opened.blobs.put(b"start"))
    return store


def _blobs_of(store: Path) -> tuple[dict[str, Path], dict[str, list[Path]]]:
    """Return the original of each task that has it, and the blobs by the column that names them."""
    with Store.open(store) as opened, opened._db.read() as session:
        finals = {task.name: opened.tasks.final(task.name) for task in opened.tasks.all()}
        originals = {name: _file(final.weights) for name, final in finals.items() if not final.is_evicted}
        found = {}
        for column in BLOB_COLUMNS:  # so a new kind of blob is flipped as soon as there is one
            digests = session.scalars(select(Blob.digest).where(Blob.id.in_(select(column))).order_by(Blob.digest))
            found[str(column)] = [file for digest in digests if (store / (file := _file(digest))).exists()]
    return originals, {kind: files for kind, files in found.items() if files}


def _file(digest: str) -> Path:
    return Path("blobs") / digest[0] / digest


def flip(path: Path, draw: random.Random) -> str:
    """Flip one bit of a file, in a new file of that name; return which one it was."""
    data = bytearray(path.read_bytes())
    at, bit = draw.randrange(len(data)), draw.randrange(8)
    data[at] ^= 1 << bit
    path.unlink()  # it may be a link to the file of the store that is copied
    path.write_bytes(data)
    return f"byte {at} of {len(data)}, bit {bit}, of {path.name}"


def _copied(source: Path, target: Path) -> Path:
    """Copy a folder in place of an earlier copy. Blobs are linked: nothing ever writes into one."""
    shutil.rmtree(target, ignore_errors=True)

    def copy(file: str, there: str) -> None:
        (os.link if "blobs" in Path(file).parts else shutil.copy2)(file, there)

    return Path(shutil.copytree(source, target, copy_function=copy))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _is_found(fleet: Fleet) -> bool:
    try:
        return any(finding.is_problem for finding in fleet.verify(read_data=True))
    except IcmError:
        return True


def _done(tally: Tally, run: Callable[[], Any]) -> bool:
    """Run something that may refuse to work on what is damaged, and say whether it did it."""
    tally.commands += 1
    try:
        run()
    except IcmError:
        tally.refused += 1
        return False
    return True


def _tell(tally: Tally, noticed: bool, what: str) -> None:
    tally.noticed += noticed
    tally.unnoticed += not noticed
    if not noticed:
        tally.note(f"unnoticed: {what}")


def _lost(tally: Tally, what: str) -> None:
    tally.deleted += 1
    tally.note(f"deleted: {what}")


@contextmanager
def digests_off() -> Iterator[None]:
    """Believe the bytes of all blobs and of all parts of bundles: the control, which has to be caught."""
    parts = (Blobs, "read"), (Blobs, "is_intact"), (BundleFile, "read"), (BundleFile, "check")
    saved = [getattr(owner, name) for owner, name in parts]

    def read_blob(self: Blobs, digest: str) -> bytes:
        with self._backend.get(digest) as file:
            return file.read()

    def read_part(self: BundleFile, digest: str) -> bytes:
        return read_exactly(self._descriptor, self.index.sizes[digest], self._begins[digest])

    Blobs.read, BundleFile.read = read_blob, read_part  # type: ignore[method-assign]
    Blobs.is_intact = lambda self, digest: True  # type: ignore[method-assign]
    BundleFile.check = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        for (owner, name), method in zip(parts, saved, strict=True):
            setattr(owner, name, method)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=60, help="bits of each kind of file")
    parser.add_argument("--output", type=Path, default=Path("tests/benchmarks/results/file-flips.json"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flips = FileFlips(Path(folder))
        found = flips.study(flips.kinds, each=chosen.each)
        sys.stderr.write(f"{json.dumps(asdict(summed(found)))}\n")
        with digests_off():
            control = flips.study([*flips.blobs, "bundle"], each=max(1, chosen.each // 7))
    document = {
        "what": "one bit of a file flipped at a time, tests/faults/file_flips.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **asdict(summed(found)),
        "by_kind": {kind: asdict(tally) for kind, tally in found.items()},
        "control": {"what": "a seventh of those in blobs and bundles, nothing hashed", **asdict(summed(control))},
    }
    chosen.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    _main()
