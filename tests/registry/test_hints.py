"""Hints for generated tasks, which have a code and never had an original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import LastCopy
from registry.records import GeneratorRecord
from registry.store import Store
from registry.tables.codes import restore_hint
from tests.registry.examples import BASE, code, eviction, generator, ingest, new_store
from tests.registry.test_bundles import bundle, imported

FOLDER = "`icm ingest --restore PATH` with the folder that `icm generate` wrote"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with an ingested task and a generated one, as `icm generate --register` records it."""
    with new_store(tmp_path / "store") as opened:
        task = imported(opened, "geese")
        original = replace(task.original, is_generated=True, source="generated geese")
        opened.bundles.add(bundle(opened, replace(task, original=original, claim=None)))
        yield opened


@pytest.fixture
def current(store: Store) -> GeneratorRecord:
    found = store.generators.current(BASE)
    assert found is not None
    return found


def hint_of(caught: pytest.ExceptionInfo[LastCopy]) -> str:
    return str(caught.value.hint)


def test_a_generator_without_its_code_is_refused_with_two_ways_out(store: Store) -> None:
    ingest(store, "rust")
    with pytest.raises(LastCopy, match="'geese'") as caught:
        store.generators.add(generator(store, ["rust"], data=b"another"))
    assert FOLDER in hint_of(caught)
    assert "`icm rm geese`" in hint_of(caught)


def test_the_second_way_out_works(store: Store) -> None:
    ingest(store, "rust")
    store.tasks.remove(["geese"], last_copies=["geese"])
    assert store.generators.add(generator(store, ["rust"], data=b"another")).is_current


def test_its_code_is_not_replaced(store: Store, current: GeneratorRecord) -> None:
    with pytest.raises(LastCopy, match="'geese'") as caught:
        store.codes.replace(current.id, code(store, "geese", data=b"other"))
    assert FOLDER in hint_of(caught)


def test_an_extended_generator_keeps_its_code(store: Store, current: GeneratorRecord) -> None:
    new = replace(generator(store, data=b"longer", parent_id=current.id), codes=[code(store, "geese", data=b"new")])
    with pytest.raises(LastCopy, match="'geese'") as caught:
        store.generators.extend(new)
    assert FOLDER in hint_of(caught)


def test_an_original_is_still_asked_for_where_there_was_one(store: Store, current: GeneratorRecord) -> None:
    ingest(store, "rust")
    store.codes.add(current.id, [code(store, "rust")])
    store.originals.evict(eviction(store, "rust"))
    with pytest.raises(LastCopy, match="'rust'") as caught:
        store.codes.replace(current.id, code(store, "rust", data=b"other"))
    assert hint_of(caught) == "run `icm ingest --restore PATH` with the folder of its original"


def test_a_mixed_set_names_the_generated_tasks() -> None:
    assert "for the generated ducks, geese, use" in restore_hint({"rust": False, "geese": True, "ducks": True})
    assert "generated" not in restore_hint({"rust": False, "sql": False})
