"""Few-shot starts: each is a file that a generator names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import GeneratorConflict, MissingBlob
from registry.records import GeneratorRecord
from registry.store import Store
from tests.registry.examples import BASE, code, generator, ingest
from tests.registry.pairs import lose, overwrite


@pytest.fixture
def made(store: Store) -> GeneratorRecord:
    """A generator with a code of one of two tasks."""
    ingest(store, "rust")
    ingest(store, "html")
    return store.generators.add(generator(store, ["rust"]))


def current(store: Store) -> GeneratorRecord:
    found = store.generators.current(BASE)
    assert found is not None
    return found


def started(store: Store, made: GeneratorRecord, data: bytes = b"start") -> GeneratorRecord:
    return store.generators.set_start(made.id, store.blobs.put(data))


def test_a_generator_begins_without_one(made: GeneratorRecord) -> None:
    assert (made.start, made.start_size) == (None, 0)


def test_a_generator_knows_its_start_and_its_length(store: Store, made: GeneratorRecord) -> None:
    record = started(store, made)
    assert store.blobs.read(str(record.start)) == b"start"
    assert record == replace(made, start=record.start, start_size=5) == current(store)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_another_takes_its_place_and_its_bytes_go(store: Store, made: GeneratorRecord) -> None:
    first = started(store, made)
    second = started(store, made, b"another start")
    assert current(store).start == second.start != first.start
    assert not store.blobs.exists(str(first.start))
    assert list(store.verify(read_data=True)) == []


def test_the_same_again_keeps_its_bytes(store: Store, made: GeneratorRecord) -> None:
    started(store, made)
    assert store.blobs.read(str(started(store, made).start)) == b"start"


def test_a_generator_that_is_not_current_any_more_gets_none(store: Store, made: GeneratorRecord) -> None:
    newer = store.generators.add(generator(store, ["rust"], data=b"newer"))
    with pytest.raises(GeneratorConflict):
        started(store, made)
    assert {row.start for row in store.generators.all()} == {None}
    assert started(store, newer).start is not None


def test_bytes_that_are_not_in_the_store_are_refused(store: Store, made: GeneratorRecord) -> None:
    before = started(store, made)
    with pytest.raises(MissingBlob):
        store.generators.set_start(made.id, "ab" * 32)
    assert current(store) == before


def test_a_failure_before_the_commit_leaves_the_earlier_one(
    store: Store, made: GeneratorRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == "rows-before-commit":
            raise RuntimeError

    before = started(store, made)
    with monkeypatch.context() as patch:
        patch.setattr("registry.tables.table.failpoint", fail)
        with pytest.raises(RuntimeError):
            started(store, made, b"another start")
    assert current(store) == before
    assert store.blobs.read(str(before.start)) == b"start"
    assert [finding.kind for finding in store.verify(read_data=True)] == ["orphan"]


def test_a_generator_that_continues_another_keeps_its_start(store: Store, made: GeneratorRecord) -> None:
    first = started(store, made)
    longer = store.generators.extend(generator(store, ["html"], data=b"longer", parent_id=made.id))
    assert (longer.start, longer.start_size) == (first.start, 5)
    assert current(store) == longer


def test_codes_that_are_added_leave_it(store: Store, made: GeneratorRecord) -> None:
    before = started(store, made)
    store.codes.add(made.id, [code(store, "html")])
    assert current(store) == before


def test_another_network_has_none(store: Store, made: GeneratorRecord) -> None:
    started(store, made)
    assert store.generators.add(generator(store, ["rust"], data=b"newer")).start is None


def test_one_that_an_earlier_generator_has_too_keeps_its_bytes(store: Store, made: GeneratorRecord) -> None:
    first = started(store, made)
    longer = store.generators.extend(generator(store, data=b"longer", parent_id=made.id))
    started(store, longer, b"another start")
    assert store.blobs.read(str(first.start)) == b"start"
    store.generators.make_current(made.id)
    assert current(store).start == first.start


def test_it_goes_with_the_last_generator_that_has_it(store: Store, made: GeneratorRecord) -> None:
    first = started(store, made)
    store.generators.add(generator(store, ["rust"], data=b"newer"))
    store.generators.forget(made)
    store.prune(grace=0)
    assert not store.blobs.exists(str(first.start))


def test_prune_keeps_it(store: Store, made: GeneratorRecord) -> None:
    record = started(store, made)
    assert store.prune(grace=0).blobs == 0
    assert store.blobs.read(str(record.start)) == b"start"


def test_it_is_on_the_bill_of_generators(store: Store, made: GeneratorRecord) -> None:
    before = store.usage()
    started(store, made)
    assert store.usage().generators == before.generators + len(b"start")
    store.generators.add(generator(store, ["rust"], data=b"newer"))
    assert store.usage().generators == len(b"newer")
    assert store.usage().old_generators >= len(b"generator") + len(b"start")


@pytest.mark.parametrize(("data", "kind"), [(b"stort", "digest"), (b"sta", "length"), (None, "missing")])
def test_damage_to_it_is_found(store: Store, made: GeneratorRecord, data: bytes | None, kind: str) -> None:
    record = started(store, made)
    if data is None:
        lose(store, str(record.start))
    else:
        overwrite(store, str(record.start), lambda _: data)
    (finding,) = store.verify(read_data=True)
    assert (finding.kind, finding.digest) == (kind, record.start)


def test_a_task_does_not_need_it(store: Store, made: GeneratorRecord) -> None:
    """Its code is decoded by the generator alone."""
    record = started(store, made)
    lose(store, str(record.start))
    assert list(store.verify(names=["rust"], read_data=True)) == []
