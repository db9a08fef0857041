"""Tasks are looked up by what they are recognised by, and no other rows are read."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import replace

import pytest

from registry.errors import DamagedRow
from registry.records import TaskIngest
from registry.storage.blobs.content import digest_of
from registry.store import Store
from registry.tables.origins import Origins
from tests.registry.examples import BASE, adapter, ingest
from tests.registry.pairs import damage


def task(store: Store, name: str, source: str, *checkpoints: str) -> TaskIngest:
    final = replace(adapter(store, f"weights of {name}".encode(), is_final=True), source=source)
    others = (
        replace(adapter(store, f"{name} at {step}".encode(), step=step), source=place)
        for step, place in enumerate(checkpoints, 5)
    )
    return TaskIngest(name, BASE, [final, *others])


def test_names_are_found_in_any_case_also_of_letters_beyond_ascii(store: Store) -> None:
    for name in ("Rust", "CAFÉ-Rust", "sql"):
        ingest(store, name)
    found = store.tasks.origins().named(["RUST", "café-rust", "css", "no-sql"])
    assert {name: origin.name for name, origin in found.items()} == {"rust": "Rust", "café-rust": "CAFÉ-Rust"}


def test_what_was_asked_once_is_remembered(store: Store) -> None:
    ingest(store, "rust")
    origins = store.tasks.origins()
    first = origins.named(["rust", "sql"])
    ingest(store, "sql")
    assert origins.named(["sql", "RUST"]) == first


def test_places_are_found_where_a_trainer_puts_adapters_and_elsewhere(store: Store) -> None:
    store.tasks.ingest(
        [
            task(store, "rust", "/runs/rust", "/runs/rust/checkpoint-5", "/elsewhere/6"),
            task(store, "sql", "/runs/sql/checkpoint-9"),
            task(store, "copy", "/runs/rust"),
            task(store, "other", "/runs/other"),
        ]
    )
    asked = ["/runs/rust", "/runs/rust/checkpoint-5", "/elsewhere/6", "/runs/sql/checkpoint-9", "/runs/sql", "/runs"]
    found = store.tasks.origins().from_places(asked)
    assert {place: [origin.name for origin in some] for place, some in found.items()} == {
        "/runs/rust": ["copy", "rust"],
        "/runs/rust/checkpoint-5": ["rust"],
        "/elsewhere/6": ["rust"],
        "/runs/sql/checkpoint-9": ["sql"],
    }
    checkpoint = store.tasks.origins().from_places(["/runs/rust/checkpoint-5"])
    assert checkpoint["/runs/rust/checkpoint-5"][0].sources == tuple(asked[:3])


def test_tensors_are_found_by_weights_and_by_their_key(store: Store) -> None:
    for number, name in enumerate(("rust", "sql", "css")):
        made = task(store, name, f"/runs/{name}", f"/runs/{name}/checkpoint-5")
        final, step = made.adapters
        keys = (f"{number:02x}" * 32, "ff" * 32)
        rows = [replace(row, tensors_key=key) for row, key in zip((final, step), keys, strict=True)]
        store.tasks.ingest([replace(made, adapters=rows)])
    weights = store.tasks.final("rust").weights
    asked = [(weights, None), ("ab" * 32, "01" * 32), ("cd" * 32, "ff" * 32)]
    assert [origin.name for origin in store.tasks.origins().with_tensors(asked)] == ["rust", "sql"]


def test_names_that_end_with_another_one_are_found_in_any_case(store: Store) -> None:
    store.tasks.ingest(
        [
            task(store, name, f"/runs/{name}")
            for name in ("a-Rust", "b-c-rust", "rust", "arust", "x-rusty", "É-rust", "a-É", "a-sql", "a-b-sql")
        ]
    )
    found = store.tasks.origins().ending_with(["RUST", "é", "b-sql", "css"])
    names = ("a-Rust", "b-c-rust", "É-rust", "a-É", "a-b-sql")
    assert sorted(found) == sorted((name, f"/runs/{name}") for name in names)


@pytest.mark.parametrize(
    "ask",
    [
        lambda origins, name: origins.named([f"a-{name}"]),
        lambda origins, name: origins.from_places([f"/runs/{name}"]),
        lambda origins, name: origins.with_tensors([(digest_of(name.encode()), None)]),
        lambda origins, name: list(origins.ending_with([name])),
    ],
)
def test_a_damaged_row_is_noticed_where_it_is_asked_for_and_only_there(
    store: Store, ask: Callable[[Origins, str], Sized]
) -> None:
    for name in ("rust", "sql"):
        final = replace(adapter(store, name.encode(), is_final=True), source=f"/runs/{name}")
        store.tasks.ingest([TaskIngest(f"a-{name}", BASE, [final])])
    damage(store, "UPDATE tasks SET pinned = NOT pinned WHERE name = 'a-sql'")
    assert len(ask(store.tasks.origins(), "rust")) == 1
    with pytest.raises(DamagedRow):
        ask(store.tasks.origins(), "sql")
