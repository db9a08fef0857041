"""Commands that write, as small ones: each makes the store, or goes on with what a killed or failed one left of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from registry.store import Store
from tests.registry.examples import BASE, code, evaluation, eviction, generator, ingest, new_store, offer, vector

FACTS: dict[str, Callable[[Store], bool]] = {
    **{name: lambda store, name=name: name in names_in(store) for name in ("rust", "html", "sql")},  # type: ignore[misc]
    "no html": lambda store: "html" not in names_in(store),
    "vectors": lambda store: len(store.vectors.all("rust")) == 2,
    "code of rust": lambda store: _has_code(store, "rust"),
    "code of html": lambda store: _has_code(store, "html"),
    "code of sql": lambda store: _has_code(store, "sql"),
    "evicted": lambda store: store.tasks.final("rust").is_evicted,
}
"""What a command may have been told to be done."""


@dataclass
class Place:
    """Where a command works.

    Attributes:
        open: Opens the store, which is made if it is absent.
        folder: For files beside it.
        tell: Is told each fact once the store has acknowledged it.
    """

    open: Callable[[], Store]
    folder: Path
    tell: Callable[[str], object] = lambda fact: None


Command = Callable[[Place], None]


def place_at(root: Path) -> Place:
    """Return a store folder as a place."""
    return Place(lambda: new_store(root), root.parent)


def _has_code(store: Store, task: str) -> bool:
    made = store.generators.current(BASE)
    return made is not None and store.codes.get(task, made.id) is not None


def names_in(store: Store) -> set[str]:
    """Return the names of all tasks."""
    return {task.name for task in store.tasks.all()}


def ingest_all(place: Place) -> None:
    """Store files, then two tasks with checkpoints."""
    with place.open() as store:
        files = [place.folder / f"file{n}" for n in range(3)]
        for file in files:
            file.write_bytes(file.name.encode())
        store.blobs.put_files(files, lambda path, data: None)
        store.tasks.ingest([offer(store, name, steps=[80, 90], samples=b"samples") for name in ("rust", "html")])
        place.tell("rust")
        place.tell("html")


def learn(place: Place) -> None:
    """Train: vectors, a run with checkpoints, a generator with a code, a measurement."""
    with place.open() as store:
        ingest(store, "rust")
        place.tell("rust")
        if not store.vectors.all("rust"):
            store.vectors.add([vector(store, "rust", number) for number in range(2)])
        place.tell("vectors")
        if store.generators.current(BASE) is None:
            run = store.runs.running(BASE) or store.runs.start(BASE, {"seed": 1})
            for step in range(run.step + 1, 3):
                data = f"step {step}".encode()
                run = store.runs.save_checkpoint(run.id, step=step, weights=data, optimizer=data * 2)
            store.generators.add(generator(store, ["rust"], train_run_id=run.id))
        place.tell("code of rust")
        store.evaluations.add([evaluation("rust")])


def extend(place: Place) -> None:
    """Let a generator grow, and prune the one before."""
    with place.open() as store:
        ingest(store, "rust")
        first = store.generators.current(BASE) or store.generators.add(generator(store, ["rust"]))
        if first.version == 1:
            ingest(store, "html")
            store.generators.extend(generator(store, ["html"], data=b"longer", parent_id=first.id))
        current = store.generators.current(BASE)
        assert current is not None
        place.tell("code of html")
        ingest(store, "sql")
        place.tell("sql")
        store.codes.add(current.id, [code(store, "sql")])
        place.tell("code of sql")
        for other in store.generators.all():
            if other.id != current.id:
                store.generators.forget(other)
        store.prune(grace=0)


def remove_and_prune(place: Place) -> None:
    """Remove a task, then its bytes."""
    with place.open() as store:
        ingest(store, "rust")
        place.tell("rust")
        if "html" not in names_in(store):
            ingest(store, "html", steps=[80])
        store.tasks.remove(["html"], last_copies=["html"])
        place.tell("no html")
        store.prune(grace=0)


def evict_and_prune(place: Place) -> None:
    """Evict a task, then prune."""
    with place.open() as store:
        if "rust" not in names_in(store):
            ingest(store, "rust", steps=[80, 90])
        place.tell("rust")
        if store.generators.current(BASE) is None:
            store.generators.add(generator(store, ["rust"]))
        store.originals.evict(eviction(store, "rust", evaluations=[evaluation("rust")]))
        place.tell("evicted")
        store.prune(grace=0)


COMMANDS = {command.__name__: command for command in (ingest_all, learn, extend, remove_and_prune, evict_and_prune)}


def problems(place: Place) -> list[object]:
    """Return what `icm verify --read-data` calls a problem."""
    with place.open() as store:
        return [finding for finding in store.verify(read_data=True) if finding.is_problem]


def contents(place: Place) -> object:
    """Return what a user sees of a store, free of times and numbers."""
    with place.open() as store:
        return [
            (
                task.name,
                sorted(f"{a.step} {a.is_evicted}" for a in store.tasks.adapters(task.name)),
                len(store.vectors.all(task.name)),
                [made.blob for made in store.generators.all() if store.codes.get(task.name, made.id)],
            )
            for task in store.tasks.all()
        ]
