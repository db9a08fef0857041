"""Training runs and their checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from registry import files as fs
from registry.records import RunCode
from registry.storage.blobs.content import Blobs
from registry.store import Store
from tests.registry.examples import BASE, generator, ingest


def save(store: Store, run_id: int, step: int, *, weights: bytes | None = None) -> None:
    data = weights or f"weights {step}".encode()
    store.runs.save_checkpoint(run_id, step=step, weights=data, optimizer=f"optimizer {step}".encode())


def stored(store: Store) -> set[bytes]:
    return {store.blobs.read(digest) for digest in store.blobs.sizes()}


def test_a_base_model_without_a_run_has_none_to_resume(store: Store) -> None:
    assert store.runs.running(BASE) is None


def test_a_run_is_resumed_from_its_latest_checkpoint(store: Store) -> None:
    run = store.runs.start(BASE, {"seed": 1})
    save(store, run.id, 10)
    save(store, run.id, 20)
    found = store.runs.running(BASE)
    assert found is not None
    assert (found.id, found.step, found.config, found.state) == (run.id, 20, {"seed": 1}, "running")
    assert found.weights is not None
    assert store.blobs.read(found.weights) == b"weights 20"


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_bytes_of_a_superseded_checkpoint_go_at_once(store: Store) -> None:
    run = store.runs.start(BASE, {})
    save(store, run.id, 10)
    save(store, run.id, 20)
    assert stored(store) == {b"weights 20", b"optimizer 20"}
    assert list(store.verify(read_data=True)) == []


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_bytes_that_did_not_change_stay(store: Store) -> None:
    run = store.runs.start(BASE, {})
    save(store, run.id, 10, weights=b"same")
    save(store, run.id, 20, weights=b"same")
    assert stored(store) == {b"same", b"optimizer 20"}


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_bytes_that_something_else_refers_to_stay(store: Store) -> None:
    run = store.runs.start(BASE, {})
    save(store, run.id, 10, weights=b"generator")
    store.generators.add(generator(store, data=b"generator"))
    save(store, run.id, 20)
    assert b"generator" in stored(store)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_generator_ends_the_run_it_came_from(store: Store) -> None:
    run = store.runs.start(BASE, {})
    save(store, run.id, 10)
    store.generators.add(generator(store, train_run_id=run.id))
    assert store.runs.running(BASE) is None
    assert stored(store) == {b"generator"}


def test_a_run_that_is_done_takes_no_more_checkpoints(store: Store) -> None:
    run = store.runs.start(BASE, {})
    store.generators.add(generator(store, train_run_id=run.id))
    with pytest.raises(LookupError):
        save(store, run.id, 10)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_new_run_gives_up_the_one_before(store: Store) -> None:
    first = store.runs.start(BASE, {"seed": 1})
    save(store, first.id, 10)
    second = store.runs.start(BASE, {"seed": 2})
    assert store.runs.running(BASE) == second
    assert stored(store) == set()


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_checkpoint_is_stored_while_another_run_drops_the_very_same_bytes(
    store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = store.runs.start(BASE, {}), twin.runs.start("other base", {})
    real = Blobs.put_all

    def put_all(blobs: Blobs, items: Sequence[fs.Bytes]) -> list[str]:
        digests = real(blobs, items)
        if blobs is store.blobs:  # before the rows are written
            for step in (10, 20):
                save(twin, other.id, step)
        return digests

    monkeypatch.setattr(Blobs, "put_all", put_all)
    save(store, run.id, 10)
    assert stored(store) == {b"weights 10", b"optimizer 10", b"weights 20", b"optimizer 20"}
    assert list(store.verify(read_data=True)) == []


def test_an_unknown_run_cannot_end(store: Store) -> None:
    with pytest.raises(LookupError):
        store.generators.add(generator(store, train_run_id=7))
    assert store.generators.all() == []


NETWORK, OTHER = "ab" * 32, "cd" * 32


def code(store: Store, task: str, data: bytes, *, network: str = NETWORK) -> RunCode:
    return RunCode(store.tasks.final(task).id, store.blobs.put(data), len(data), network, 0.25, True)


def test_codes_of_a_run_are_found_again_under_the_network_that_they_were_made_with(store: Store) -> None:
    ingest(store, "rust")
    run = store.runs.start(BASE, {})
    made = code(store, "rust", b"code of rust")
    store.runs.save_codes(run.id, [made])
    assert store.runs.codes(run.id, NETWORK) == [made]
    assert store.runs.codes(run.id, OTHER) == []
    assert store.runs.codes(run.id + 1, NETWORK) == []


def test_a_code_of_another_network_takes_the_place_of_an_earlier_one(store: Store) -> None:
    ingest(store, "rust")
    run = store.runs.start(BASE, {})
    store.runs.save_codes(run.id, [code(store, "rust", b"old")])
    new = code(store, "rust", b"newer", network=OTHER)
    store.runs.save_codes(run.id, [new])
    assert (store.runs.codes(run.id, NETWORK), store.runs.codes(run.id, OTHER)) == ([], [new])


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_codes_of_a_run_are_not_garbage(store: Store) -> None:
    ingest(store, "rust")
    run = store.runs.start(BASE, {})
    store.runs.save_codes(run.id, [code(store, "rust", b"code of rust")])
    store.prune(grace=0)
    assert b"code of rust" in stored(store)
    assert list(store.verify(read_data=True)) == []


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_codes_of_a_run_that_is_given_up_go_with_it(store: Store) -> None:
    ingest(store, "rust")
    first = store.runs.start(BASE, {"seed": 1})
    store.runs.save_codes(first.id, [code(store, "rust", b"code of rust")])
    store.runs.start(BASE, {"seed": 2})
    assert store.runs.codes(first.id, NETWORK) == []
    assert b"code of rust" not in stored(store)


def test_codes_of_a_run_stay_where_its_generator_takes_them_over(store: Store) -> None:
    ingest(store, "rust")
    run = store.runs.start(BASE, {})
    published = generator(store, ["rust"], train_run_id=run.id)
    (new,) = published.codes
    adapter = store.tasks.final("rust").id
    store.runs.save_codes(run.id, [RunCode(adapter, new.blob, 1, NETWORK, 0.25, True)])
    made = store.generators.add(published)
    assert store.runs.codes(run.id, NETWORK) == []
    assert [row.blob for row in store.codes.all(made.id)] == [new.blob]
    assert list(store.verify(read_data=True)) == []


def test_a_task_that_is_removed_takes_its_code_of_a_run_along(store: Store) -> None:
    ingest(store, "rust")
    run = store.runs.start(BASE, {})
    store.runs.save_codes(run.id, [code(store, "rust", b"code of rust")])
    store.tasks.remove(["rust"])
    assert store.runs.codes(run.id, NETWORK) == []


def test_a_code_of_an_adapter_that_is_gone_is_not_recorded(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "sql")
    run = store.runs.start(BASE, {})
    codes = [code(store, "rust", b"code of rust"), code(store, "sql", b"code of sql")]
    store.tasks.remove(["rust"])
    store.runs.save_codes(run.id, codes)
    assert store.runs.codes(run.id, NETWORK) == codes[1:]
