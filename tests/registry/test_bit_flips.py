"""One flipped bit anywhere in a store never deletes, swaps or hides a task for good.

a bit flips ──▶ commands continue if they can ──▶ verify, rebuild, repair ──▶ every task as before
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import RegistryError
from registry.findings import OF_FILES
from registry.manifests import Run, Task
from registry.storage.folder import FORMAT_TEXT
from registry.store import Store
from tests.registry.examples import BASE, evict, ingest, new_store, put, task, train, vector

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")

PARTS = {  # what flips -> the files
    "registry.db": "registry.db",
    "manifests": "manifests/*/*",
    "blobs": "blobs/*/*",
    "other files": "[FBrl]*[!b]",  # FORMAT, reserve, locks
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a state of every kind: versions, an evicted task, two generators, a training, a removal."""
    place = tmp_path_factory.mktemp("filled") / "store"
    with new_store(place) as store:
        ingest(store, "rust", steps=[80], vectors=(vector(store),), tags=("a", "b"), note="note")
        first = ingest(store, "html", samples=put(store, b"samples"))
        store.publish([replace(first, version=2, final=task(store, "html", weights=b"second").final)])
        for name in ("gone", "lost", "poems", "sql"):
            ingest(store, name)
        train(store, ["rust", "sql"])
        train(store, ["html", "lost"], data=b"second generator")
        evict(store, "lost")
        store.update_base(BASE, lambda base: replace(base, fingerprint="f00d"))
        for base in (BASE, "example/other"):
            store.save_run(Run(base_model=base, config={}, weights=put(store, base.encode())))
        store.end_run("example/other")
        store.update("html@1", lambda known: replace(known, note="old"))
        store.remove(store.named(["gone"]))
    return place


def contents(store: Store) -> dict[str, object]:
    """Return everything that can be read of all tasks, with the bytes that they need."""
    found: dict[str, object] = {"generators": store.generators(), "run": store.run(BASE), "bases": store.base_models()}
    for name in store.names():
        for version in store.history(name):
            found[f"{name}@{version.version}"] = version, files_of(store, version)
    return found


def files_of(store: Store, task: Task) -> list[bytes]:
    files = [one.weights for one in task.adapters if not one.is_evicted]
    files += [one.config for one in task.adapters]
    files += [] if task.code is None else [task.code.blob, task.code.generator]
    return [store.blobs.read(file) for file in files]


def flips(place: Path, pattern: str, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Choose files and bits at random: each file as likely as another."""
    draw, files = random.Random(seed), sorted(path for path in place.glob(pattern) if path.stat().st_size)
    for _ in range(count):
        path = draw.choice(files)
        yield path.relative_to(place), draw.randrange(path.stat().st_size * 8)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(data)


def go_on(place: Path) -> None:
    """Use a damaged store: read everything, change something, evict, remove files that nothing needs."""
    with suppress(RegistryError), new_store(place) as store:
        works = (
            lambda: list(store.tasks()),
            lambda: list(store.rows()),
            lambda: store.prune(grace=0),
            lambda: store.update("sql", lambda known: replace(known, note="new")),
            lambda: store.free(names=["rust", "html", "sql"]),
            lambda: store.prune(grace=0),
        )
        for work in works:
            with suppress(RegistryError):
                work()


def repair(place: Path) -> None:
    """Do as `icm verify --repair` does."""
    if (place / "FORMAT").read_text(errors="replace") != FORMAT_TEXT:  # the hint contains the text to write
        (place / "FORMAT").chmod(0o644)
        (place / "FORMAT").write_text(FORMAT_TEXT)
    with new_store(place) as store:
        findings = list(store.verify(read_data=True))
        if any(finding.is_of_database for finding in findings):
            store.rebuild()
            findings = list(store.verify(read_data=True))
        done = [store.repair(finding) for finding in findings if finding.kind in OF_FILES]
        # None: corrected with the manifest that shares the document
        assert all(result is None or result.startswith("corrected") for result in done)


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", PARTS)
def test_every_task_survives(filled: Path, tmp_path: Path, part: str, count: int) -> None:
    with new_store(filled) as store:
        before = contents(store)
    for number, (file, bit) in enumerate(flips(filled, PARTS[part], count, seed=count)):
        place = shutil.copytree(filled, tmp_path / str(number))
        flip(place / file, bit)
        go_on(place)
        repair(place)
        with new_store(place) as store:
            assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == [], (file, bit)
            assert without_note(contents(store)) == without_note(before), (file, bit)
        shutil.rmtree(place)


def without_note(found: dict[str, object]) -> dict[str, object]:
    """Leave out what `go_on` may have changed."""

    def plain(value: object) -> object:
        if not isinstance(value, tuple):
            return value
        state, files = value
        return replace(state, seq=0, parent=None, note=None if state.name == "sql" else state.note), files

    return {name: plain(value) for name, value in found.items()}
