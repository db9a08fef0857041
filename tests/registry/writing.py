"""Small commands that write: each creates the store, or continues after a killed or failed command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from registry.manifests import Run
from registry.store import Store
from tests.registry.examples import BASE, code, evict, ingest, measurement, new_store, put, task, train, vector

FACTS: dict[str, Callable[[Store], bool]] = {
    **{name: lambda store, name=name: store.find(name) is not None for name in ("rust", "html", "sql")},  # type: ignore[misc]
    "no html": lambda store: store.find("html") is None,
    "vectors": lambda store: len(store.task("rust").vectors) == 2,
    "code of rust": lambda store: store.task("rust").code is not None,
    "code of html": lambda store: store.task("html").code is not None,
    "evicted": lambda store: store.task("rust").final.is_evicted,
    "version 2": lambda store: store.task("rust").version == 2,
}
"""The facts that the store may acknowledge to a command."""


@dataclass
class Place:
    """Where a command works.

    Attributes:
        open: Opens the store, creating it if absent.
        folder: For other files.
        tell: Callback for each fact that the store has acknowledged.
    """

    open: Callable[[], Store]
    folder: Path
    tell: Callable[[str], object] = lambda fact: None


Command = Callable[[Place], None]


def place_at(root: Path) -> Place:
    """Return a store folder as a place."""
    return Place(lambda: new_store(root), root.parent)


def _known(store: Store, name: str, **options: object) -> None:
    if store.find(name) is None:
        ingest(store, name, **options)


def ingest_all(place: Place) -> None:
    """Store files, then two tasks with checkpoints."""
    with place.open() as store:
        files = [place.folder / f"file{n}" for n in range(3)]
        for file in files:
            file.write_bytes(file.name.encode())
        store.blobs.put_files(files, lambda path, data: None)
        samples = put(store, b"samples")
        new = [name for name in ("rust", "html") if store.find(name) is None]
        store.publish([task(store, name, steps=[80, 90], samples=samples) for name in new])
        place.tell("rust")
        place.tell("html")


def learn(place: Place) -> None:
    """Train: vectors, a run with checkpoints, a generator with a code, a measurement."""
    with place.open() as store:
        _known(store, "rust")
        place.tell("rust")
        vectors = tuple(vector(store, number) for number in range(2))
        store.update("rust", lambda known: replace(known, vectors=vectors))
        place.tell("vectors")
        if store.generator(BASE) is None:
            run = store.run(BASE) or Run(base_model=BASE, config={"seed": 1})
            for step in range(run.step + 1, 3):
                data = f"step {step}".encode()
                saved = replace(run, step=step, weights=put(store, data), optimizer=put(store, data * 2))
                run = store.save_run(saved)
            train(store, ["rust"])
        store.end_run(BASE)
        place.tell("code of rust")
        store.update("rust", lambda known: replace(known, measured=known.with_measured(measurement())))


def extend(place: Place) -> None:
    """Replace the generator and all codes, and prune the old ones."""
    with place.open() as store:
        _known(store, "rust")
        first = store.generator(BASE) or train(store, ["rust"])
        _known(store, "html")
        if first.version == 1:
            train(store, ["rust", "html"], data=b"longer")
        place.tell("code of rust")
        place.tell("code of html")
        store.prune(grace=0)


def remove_and_prune(place: Place) -> None:
    """Remove a task, then its bytes."""
    with place.open() as store:
        _known(store, "rust")
        place.tell("rust")
        _known(store, "html", steps=[80])
        store.remove(store.named(["html"]))
        place.tell("no html")
        store.free(names=["html"])
        store.prune(grace=0)


def evict_and_prune(place: Place) -> None:
    """Evict a task, then prune."""
    with place.open() as store:
        _known(store, "rust", steps=[80, 90])
        place.tell("rust")
        if store.generator(BASE) is None:
            train(store, ["rust"])
        evict(store, "rust")
        place.tell("evicted")
        store.prune(grace=0)


def next_version(place: Place) -> None:
    """Publish another adapter of a task, and a code of the one before."""
    with place.open() as store:
        _known(store, "rust")
        final = task(store, "rust", weights=b"better weights").final
        store.update("rust", lambda known: known if known.version > 1 else replace(known, version=2, final=final))
        place.tell("version 2")
        made = code(store, "rust")
        store.update("rust@1", lambda known: replace(known, code=made))


COMMANDS = {
    command.__name__: command
    for command in (ingest_all, learn, extend, remove_and_prune, evict_and_prune, next_version)
}


def problems(place: Place) -> list[object]:
    """Return the problems that `icm verify --read-data` finds."""
    with place.open() as store:
        return [finding for finding in store.verify(read_data=True) if finding.is_problem]


def contents(place: Place) -> object:
    """Return the store as a user sees it, without times and numbers."""
    with place.open() as store:
        return [
            (
                version.name,
                version.version,
                sorted(f"{one.step} {one.is_evicted}" for one in version.adapters),
                len(version.vectors),
                None if version.code is None else str(version.code.blob),
                len(version.measured),
            )
            for name in store.names()
            for version in store.history(name)
        ]
