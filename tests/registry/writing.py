"""Commands that write, as small ones: each makes the store, or goes on with what a killed or failed one left of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from registry.store import Store
from tests.registry.examples import BASE, code, evaluation, eviction, generator, ingest, new_store, offer, vector


@dataclass
class Place:
    """Where a command works.

    Attributes:
        open: Opens the store, which is made if it is absent.
        folder: For files beside it.
        acknowledged: What the store has said to be done, each as a question whether it still is.
    """

    open: Callable[[], Store]
    folder: Path
    acknowledged: list[Callable[[Store], bool]] = field(default_factory=list)

    def has(self, *names: str) -> None:
        """Take down that tasks were ingested."""
        self.acknowledged.append(lambda store: set(names) <= names_in(store))

    def forgotten(self, store: Store) -> int:
        """Count what was acknowledged and is not there."""
        return sum(not is_kept(store) for is_kept in self.acknowledged)


Command = Callable[[Place], None]


def place_at(root: Path) -> Place:
    """Return a store folder as a place."""
    return Place(lambda: new_store(root), root.parent)


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
        place.has("rust", "html")


def learn(place: Place) -> None:
    """Train: vectors, a run with checkpoints, a generator with a code, a measurement."""
    with place.open() as store:
        ingest(store, "rust")
        place.has("rust")
        if not store.vectors.all("rust"):
            store.vectors.add([vector(store, "rust", number) for number in range(2)])
        place.acknowledged.append(lambda store: len(store.vectors.all("rust")) == 2)
        if store.generators.current(BASE) is None:
            run = store.runs.running(BASE) or store.runs.start(BASE, {"seed": 1})
            for step in range(run.step + 1, 3):
                data = f"step {step}".encode()
                run = store.runs.save_checkpoint(run.id, step=step, weights=data, optimizer=data * 2)
            store.generators.add(generator(store, ["rust"], train_run_id=run.id))
        made = store.generators.current(BASE)
        assert made is not None
        place.acknowledged.append(lambda store: store.codes.get("rust", made.id) is not None)
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
        place.acknowledged.append(lambda store: current.blob in {made.blob for made in store.generators.all()})
        ingest(store, "sql")
        place.has("rust", "html", "sql")
        store.codes.add(current.id, [code(store, "sql")])
        place.acknowledged.append(lambda store: store.codes.get("sql", current.id) is not None)
        for other in store.generators.all():
            if other.id != current.id:
                store.generators.forget(other)
        store.prune(grace=0)


def remove_and_prune(place: Place) -> None:
    """Remove a task, then its bytes."""
    with place.open() as store:
        ingest(store, "rust")
        place.has("rust")
        if "html" not in names_in(store):
            ingest(store, "html", steps=[80])
        store.tasks.remove(["html"], last_copies=["html"])
        place.acknowledged.append(lambda store: "html" not in names_in(store))
        store.prune(grace=0)


def evict_and_prune(place: Place) -> None:
    """Evict a task, then prune."""
    with place.open() as store:
        if "rust" not in names_in(store):
            ingest(store, "rust", steps=[80, 90])
        place.has("rust")
        if store.generators.current(BASE) is None:
            store.generators.add(generator(store, ["rust"]))
        store.originals.evict(eviction(store, "rust", evaluations=[evaluation("rust")]))
        place.acknowledged.append(lambda store: store.tasks.final("rust").is_evicted)
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
