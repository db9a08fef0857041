"""Generators and the codes that need them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import GeneratorNotFound
from registry.manifests import Generator
from registry.store import Store
from tests.registry.examples import BASE, evict, ingest, put, train


def test_a_code_keeps_its_generator(store: Store) -> None:
    for name in ("rust", "html"):
        ingest(store, name)
    first = train(store, ["rust"])
    second = train(store, ["html"], data=b"second")
    assert store.generator(BASE) == second
    report = store.prune(grace=0)
    assert report.generators == 0
    assert store.generator_of(store.task("rust").code.generator, BASE) == first  # type: ignore[union-attr]
    assert store.blobs.read(first.blob) == b"generator"


def test_one_that_no_code_needs_is_deleted_with_its_start(store: Store) -> None:
    ingest(store, "rust")
    train(store, ["rust"])
    start = put(store, b"start")
    (first,) = store.publish([replace(store.generators()[0], start=start)])
    second = train(store, ["rust"], data=b"second")
    report = store.prune(grace=0)
    assert (report.generators, store.generators()) == (1, [second])
    assert not store.blobs.exists(first.blob)
    assert not store.blobs.exists(start)
    assert list(store.verify(read_data=True)) == []
    with pytest.raises(GeneratorNotFound):
        store.generator_of(first.blob, BASE)


def test_the_current_one_stays_without_codes(store: Store) -> None:
    train(store)
    assert store.prune(grace=0).generators == 0


def test_an_earlier_version_of_a_task_keeps_its_generator(store: Store) -> None:
    ingest(store, "rust")
    first = train(store, ["rust"])
    known = store.task("rust")
    store.publish([replace(known, version=2, code=None)])
    train(store, ["rust"], data=b"second")
    assert store.prune(grace=0).generators == 0
    assert store.blobs.exists(first.blob)


def test_an_evicted_task_keeps_its_generator(store: Store) -> None:
    ingest(store, "rust")
    first = train(store, ["rust"])
    evict(store, "rust")
    train(store, data=b"second")
    store.prune(grace=0)
    assert store.blobs.exists(first.blob)


def test_a_network_may_come_back_as_a_later_version(store: Store) -> None:
    ingest(store, "rust")
    first = train(store, ["rust"])
    second = train(store, data=b"second")

    def rolled_back(current: Generator | None) -> Generator:
        assert current == second
        return replace(first, version=3, seq=current.seq, manifest=current.manifest)

    third = store.update_generator(BASE, rolled_back)
    assert (store.generator(BASE), third.blob, len(store.generators())) == (third, first.blob, 3)
    report = store.prune(grace=0)
    assert (report.generators, store.generators()) == (2, [third])
    assert store.blobs.read(third.blob) == b"generator"
    assert store.rebuild().tasks == 1
    assert store.generator(BASE) == third


def test_young_ones_stay(store: Store) -> None:
    first = train(store)
    train(store, data=b"second")
    report = store.prune(grace=3600)
    assert (report.generators, len(store.generators())) == (0, 2)
    assert store.blobs.exists(first.blob)
