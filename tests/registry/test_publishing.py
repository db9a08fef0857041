"""Publishing states: compare-and-swap, versions, and what a reader finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import DamagedStore, LostRace, StoreReadOnly, TaskConflict, TaskNotFound
from registry.filters import Selection, parse_filter, parse_sort
from registry.manifests import BaseRecord, Run, Task
from registry.states import PAGE
from registry.store import Store
from tests.registry.examples import BASE, adapter, code, ingest, measurement, put, task, train
from tests.registry.pairs import damage, lose


def test_a_published_task_is_found_in_any_case(store: Store) -> None:
    made = ingest(store, "Rust", tags=("a",))
    assert store.task("rUST") == made
    assert store.find("RUST") == made
    assert [row.name for row in store.rows()] == ["Rust"]


def test_a_task_that_does_not_exist_is_not_found_and_close_names_are(store: Store) -> None:
    ingest(store, "shakespeare")
    assert store.find("shakespear") is None
    with pytest.raises(TaskNotFound, match="shakespear") as caught:
        store.task("shakespear")
    assert caught.value.matches == ("shakespeare",)


def test_a_new_task_with_a_known_name_is_a_conflict(store: Store) -> None:
    ingest(store, "rust")
    with pytest.raises(TaskConflict):
        ingest(store, "RUST", weights=b"others")
    assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"


def test_a_state_that_was_replaced_meanwhile_is_not_overwritten(store: Store, twin: Store) -> None:
    seen = ingest(store, "rust")
    twin.update("rust", lambda known: replace(known, note="theirs"))
    with pytest.raises(LostRace):
        store.publish([replace(seen, note="mine")])
    assert store.task("rust").note == "theirs"


def test_two_processes_may_make_the_same_change_at_the_same_time(
    store: Store, twin: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(store, "rust")
    monkeypatch.setattr("time.time_ns", lambda: 1_900_000_000_000_000_000)
    here, there = (replace(one.task("rust"), note="ours") for one in (store, twin))
    put_all = store.manifests.put_all

    def overtaken(data: Sequence[bytes]) -> list[str]:
        monkeypatch.setattr(store.manifests, "put_all", put_all)
        twin.publish([there])
        return put_all(data)

    monkeypatch.setattr(store.manifests, "put_all", overtaken)
    with pytest.raises(LostRace):
        store.publish([here])
    task = twin.task("rust")
    assert task.note == "ours"
    assert twin.manifests.exists(str(task.manifest))


def test_an_update_that_loses_a_race_is_made_again(store: Store, twin: Store) -> None:
    ingest(store, "rust")
    attempts: list[Task] = []

    def change(known: Task) -> Task:
        if not attempts:
            twin.update("rust", lambda theirs: replace(theirs, tags=("theirs",)))
        attempts.append(known)
        return replace(known, note="mine")

    done = store.update("rust", change)
    assert (done.note, done.tags, len(attempts)) == ("mine", ("theirs",), 2)
    assert store.task("rust") == done


def test_an_update_without_a_change_writes_nothing(store: Store) -> None:
    ingest(store, "rust")
    before = store.changes()
    store.update("rust", lambda known: replace(known, note=None))
    assert store.changes() == before


def test_many_states_are_published_together_or_not_at_all(store: Store) -> None:
    seen = ingest(store, "rust")
    store.update("rust", lambda known: replace(known, note="newer"))
    with pytest.raises(LostRace):
        store.publish([task(store, "html"), replace(seen, note="old")])
    assert store.names() == ["rust"]


def test_a_generator_and_its_codes_appear_in_one_transaction(store: Store, twin: Store) -> None:
    for name in ("rust", "html"):
        ingest(store, name)
    changes = store.changes()
    made = train(store, ["rust", "html"])
    assert store.changes() == changes + 1
    assert twin.generator(BASE) == made
    assert all(found.code is not None and found.code.generator == made.blob for found in twin.tasks())


def test_every_version_of_a_task_can_be_read_and_changed(store: Store) -> None:
    ingest(store, "rust", note="first")
    better = adapter(store, b"better")
    store.update("rust", lambda known: replace(known, version=2, final=better))
    assert [one.version for one in store.history("rust")] == [1, 2]
    assert store.task("rust").final.weights == better.weights
    assert store.blobs.read(store.task("rust@1").final.weights) == b"weights of rust"
    store.update("rust@1", lambda known: replace(known, note="old one"))
    assert store.task("RUST@1").note == "old one"
    assert store.task("rust").note == "first"
    assert store.task("rust@2") == store.task("rust")
    with pytest.raises(TaskNotFound, match="rust@3"):
        store.task("rust@3")


def test_an_alias_stands_for_a_version(store: Store) -> None:
    ingest(store, "rust")
    better = adapter(store, b"better")
    store.update("rust", lambda known: replace(known, version=2, final=better, aliases={"prod": 1}))
    assert store.task("rust@prod").version == 1
    with pytest.raises(TaskNotFound):
        store.task("rust@staging")


def test_a_renamed_task_takes_its_versions_along(store: Store) -> None:
    ingest(store, "rust")
    better = adapter(store, b"better")
    store.update("rust", lambda known: replace(known, version=2, final=better))
    old = store.history("rust")
    store.publish([replace(one, name="oxide", manifest=None) for one in old], remove=[old[-1]])
    assert store.find("rust") is None
    assert [one.version for one in store.history("oxide")] == [1, 2]
    assert store.blobs.read(store.task("oxide@1").final.weights) == b"weights of rust"


def test_a_removed_task_can_be_made_again(store: Store) -> None:
    ingest(store, "rust", note="first")
    store.remove(store.named(["RUST"]))
    assert store.names() == []
    assert store.rebuild().removed == ("rust",)
    assert store.names() == []
    ingest(store, "rust", note="second")
    store.rebuild()
    assert store.task("rust").note == "second"


def test_states_of_another_store_keep_their_digests(store: Store, tmp_path: Path) -> None:
    from tests.registry.examples import new_store

    ingest(store, "rust")
    store.update("rust", lambda known: replace(known, version=2, final=adapter(store, b"better")))
    versions = store.history("rust")
    with new_store(tmp_path / "other") as other:
        other.blobs.put_all([store.blobs.read(blob.digest) for blob in store.blobs.all()])
        other.adopt(versions)
        assert [one.manifest for one in other.history("rust")] == [one.manifest for one in versions]
        with pytest.raises(TaskConflict):
            other.adopt(versions)


def test_a_run_is_saved_in_place_of_its_earlier_checkpoint(store: Store) -> None:
    first = Run(base_model=BASE, config={"seed": 1}, step=1, weights=put(store, b"step 1"), optimizer=put(store, b"o"))
    store.save_run(first)
    store.save_run(replace(first, step=2, weights=put(store, b"step 2")))
    found = store.run(BASE)
    assert found is not None
    assert found.step == 2
    assert not store.blobs.exists(first.weights or "") or store.blobs.is_remote  # young bytes stay in a remote place
    assert store.blobs.read(found.optimizer or "") == b"o"
    store.end_run(BASE)
    assert store.run(BASE) is None


def test_a_base_model_is_known_by_its_labels_and_by_its_tasks(store: Store) -> None:
    ingest(store, "rust")
    assert [base.name for base in store.base_models()] == [BASE]
    store.update_base("other/base", lambda base: replace(base, fingerprint="f00d"))
    assert store.base_model("other/base") == BaseRecord(
        name="other/base", fingerprint="f00d", seq=store.base_model("other/base").seq
    )
    assert [base.name for base in store.base_models()] == [BASE, "other/base"]
    assert store.task_counts() == {BASE: 1}


def test_a_read_only_store_refuses_every_write(store: Store) -> None:
    ingest(store, "rust")
    with Store.open(store.address, read_only=True) as reader:
        seen = reader.task("rust")
        for write in (
            lambda: reader.blobs.put(b"x"),
            lambda: reader.publish([replace(seen, note="x")]),
            lambda: reader.update("rust", lambda known: replace(known, note="x")),
            lambda: reader.remove(reader.named(["rust"])),
            reader.prune,
            reader.rebuild,
        ):
            with pytest.raises(StoreReadOnly):
                write()
    assert store.task("rust").note is None


class TestSelections:
    """Listed tasks and their order; the same for rows and for manifests."""

    @pytest.fixture
    def fleet(self, store: Store) -> Store:
        for number, name in enumerate(("Rust", "html", "sql", "Größe")):
            ingest(store, name, tags=("prod",) if number < 2 else (), note="Kept" if name == "sql" else None)
        train(store, ["rust", "sql"])
        store.update("sql", lambda known: replace(known, pinned=True))
        good = measurement(generator=str(store.task("sql").code.generator))  # type: ignore[union-attr]
        store.update("sql", lambda known: replace(known, measured=(good,)))
        return store

    @pytest.mark.parametrize(
        ("filters", "names"),
        [
            ((), ["größe", "html", "rust", "sql"]),
            (("name=RUST",), ["rust"]),
            (("name~GRÖ",), ["größe"]),
            (("tag=prod",), ["html", "rust"]),
            (("tag!=prod",), ["größe", "sql"]),
            (("tag~pro", "rank>=8"), ["html", "rust"]),
            (("status=coded",), ["rust", "sql"]),
            (("status=pinned",), ["sql"]),
            (("status!=coded",), ["größe", "html"]),
            (("gain>0.9",), ["sql"]),
            (("gain!=0.97",), ["größe", "html", "rust"]),
            (("error<=0.1",), ["rust", "sql"]),
            (("error<0.1",), []),
            (("base~EXAMPLE",), ["größe", "html", "rust", "sql"]),
            (("note~kep",), ["sql"]),
            (("note=",), ["größe", "html", "rust"]),
            (("size>1KB",), []),
            (("code>0", "tag=prod"), ["rust"]),
        ],
    )
    def test_a_filter_lists_the_tasks_that_pass(self, fleet: Store, filters: tuple[str, ...], names: list[str]) -> None:
        selection = Selection(filters=tuple(map(parse_filter, filters)))
        assert sorted(map(str.lower, fleet.names(selection))) == names
        assert sorted(row.name.lower() for row in fleet.rows(selection)) == names
        assert sorted(found.name.lower() for found in fleet.tasks(selection)) == names
        assert fleet.count(selection) == len(names)

    def test_tasks_without_a_value_come_last_in_both_orders(self, fleet: Store) -> None:
        for order in ("gain:asc", "gain:desc"):
            assert fleet.names(Selection(sort=parse_sort(order)))[0] == "sql"

    def test_names_are_in_order_and_a_limit_cuts(self, fleet: Store) -> None:
        assert fleet.names() == ["Größe", "html", "Rust", "sql"]
        assert fleet.names(Selection(limit=2)) == ["Größe", "html"]
        assert fleet.names(Selection(sort=parse_sort("name:desc"), limit=1)) == ["sql"]

    def test_a_label_of_the_base_model_finds_its_tasks(self, fleet: Store) -> None:
        from registry.manifests import BaseLabel

        fleet.update_base(BASE, lambda base: replace(base, labels=(BaseLabel(label="mirror/Copy", reason="told"),)))
        assert fleet.count(Selection(filters=(parse_filter("base=mirror/copy"),))) == 4

    def test_rows_say_what_manifests_say(self, fleet: Store) -> None:
        for row in fleet.rows():
            found = fleet.task(row.name)
            assert row.manifest == found.manifest
            assert (row.base, row.rank, row.pinned) == (found.base_model, found.final.rank_max, found.pinned)
            assert row.code_size == (None if found.code is None else found.code.size)
            assert row.tags.split() == list(found.tags)
        assert fleet.tags() == {"prod": 2}


def test_more_tasks_than_a_page_are_all_listed(store: Store) -> None:
    first = task(store, "task0")
    store.publish([replace(first, name=f"task{number}") for number in range(PAGE + 3)])
    assert len(store.names()) == len(list(store.tasks())) == PAGE + 3


def test_a_task_with_a_missing_manifest_costs_no_other(store: Store) -> None:
    lost = ingest(store, "rust")
    ingest(store, "html")
    lose(store, str(lost.manifest))
    told: list[str] = []
    with Store.open(store.address, on_damage=lambda name, error: told.append(name)) as reader:
        assert [found.name for found in reader.tasks()] == ["html"]
    assert told == ["rust"]
    with Store.open(store.address) as reader, pytest.raises(DamagedStore, match="missing"):
        list(reader.tasks())


def test_a_ref_to_the_manifest_of_another_task_is_damage(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html")
    damage(store, "UPDATE refs SET manifest = (SELECT manifest FROM refs AS o WHERE o.key = 'html') WHERE key = 'rust'")
    with pytest.raises(DamagedStore, match="points task 'rust' to a manifest of task 'html'"):
        store.task("rust")


def test_measurements_of_one_subject_replace_each_other(store: Store) -> None:
    ingest(store, "rust")
    store.update("rust", lambda known: replace(known, measured=known.with_measured(measurement(nats=2.0))))
    store.update("rust", lambda known: replace(known, measured=known.with_measured(measurement(nats=1.0))))
    assert [one.value for one in store.task("rust").measured] == [1.0]


def test_a_code_keeps_the_generator_that_made_it(store: Store) -> None:
    for name in ("rust", "html"):
        ingest(store, name)
    first = train(store, ["rust", "html"])
    second = train(store, ["html"], data=b"generator 2")
    assert store.generator(BASE) == second
    assert store.task("rust").code_under(second) is None
    assert store.task("rust").code_under(first) == code(store, "rust")
    assert [one.version for one in store.generators(BASE)] == [1, 2]
    assert store.generator_of(first.blob, BASE).version == 1


def test_a_task_whose_versions_are_gone_from_the_database_is_damaged(store: Store) -> None:
    ingest(store, "rust")
    damage(store, "DELETE FROM history")
    with pytest.raises(DamagedStore, match="no version of task 'rust'"):
        store.history("rust")
