"""Tasks and their adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import InvalidName, LastCopy, MissingBlob, TaskConflict, TaskNotFound
from registry.records import TaskIngest
from registry.store import Store
from registry.tables import summaries
from tests.registry.examples import (
    BASE,
    LAYOUT,
    adapter,
    evaluation,
    eviction,
    generator,
    ingest,
    new_store,
    offer,
    vector,
)


def names(store: Store) -> list[str]:
    return [task.name for task in store.tasks.all()]


class TestIngest:
    """Recording a task."""

    def test_a_task_has_what_was_offered(self, store: Store) -> None:
        offered = offer(store, "rust", steps=[80, 90], samples=b"samples", eval_data=b"eval", card=b"card")
        assert store.tasks.ingest([offered])[0].status == "added"
        task = store.tasks.get("rust")
        assert (task.base_model, task.samples, task.eval_data) == (BASE, offered.samples, offered.eval_data)
        final = store.tasks.final("rust")
        assert (final.task, final.step, final.is_final, final.layout) == ("rust", None, True, tuple(LAYOUT))
        assert final.original_bytes == len(b"weights of rust") + len(b'{"r": 8}') + len(b"card")
        assert [adapter.step for adapter in store.tasks.adapters("rust")] == [80, 90, None]

    def test_many_read_with_one_look_are_what_each_is_alone(self, store: Store) -> None:
        ingest(store, "rust", steps=[90, 80])
        ingest(store, "html")
        found = store.tasks.wholes(["rust", "html", "gone"])
        assert found == {name: store.tasks.whole(name) for name in ("rust", "html")}

    def test_the_same_again_changes_nothing(self, store: Store) -> None:
        offered = offer(store, "rust", steps=[80], samples=b"samples")
        assert store.tasks.ingest([offered])[0].new == 2
        before = (store.tasks.get("rust"), store.tasks.adapters("rust"))
        outcome = store.tasks.ingest([offered])[0]
        assert (outcome.new, outcome.known, outcome.status) == (0, 2, "known")
        assert (store.tasks.get("rust"), store.tasks.adapters("rust")) == before

    def test_a_later_checkpoint_is_added(self, store: Store) -> None:
        ingest(store, "rust", steps=[80])
        outcome = store.tasks.ingest([offer(store, "rust", steps=[80, 90])])[0]
        assert (outcome.new, outcome.known, outcome.status) == (1, 2, "updated")

    def test_a_checkpoint_with_the_bytes_of_the_final_adapter_is_one_of_its_own(self, store: Store) -> None:
        final = adapter(store, b"same", is_final=True)
        store.tasks.ingest([TaskIngest("rust", BASE, [final, replace(final, is_final=False, step=100)])])
        assert [(a.step, a.is_final) for a in store.tasks.adapters("rust")] == [(100, False), (None, True)]

    def test_the_final_adapter_is_known_by_its_bytes_whatever_its_step(self, store: Store) -> None:
        final = adapter(store, b"same", is_final=True, step=100)
        store.tasks.ingest([TaskIngest("rust", BASE, [final])])
        outcome = store.tasks.ingest([TaskIngest("rust", BASE, [replace(final, step=None)])])[0]
        assert (outcome.new, outcome.known) == (0, 1)

    def test_a_name_that_differs_in_case_only_is_the_same_task(self, store: Store) -> None:
        ingest(store, "Rust", weights=b"w")
        assert store.tasks.ingest([offer(store, "rust", weights=b"w")])[0].name == "Rust"
        assert names(store) == ["Rust"]

    def test_a_layout_is_kept_once_for_all(self, store: Store) -> None:
        for name in ("a", "b"):
            ingest(store, name, steps=[1, 2])
        with store._db.read() as session:
            assert session.connection().exec_driver_sql("SELECT count(*) FROM documents").scalar_one() == 1

    def test_two_final_adapters_are_a_mistake(self, store: Store) -> None:
        with pytest.raises(ValueError, match="exactly one"):
            store.tasks.ingest([TaskIngest("rust", BASE, [adapter(store, w, is_final=True) for w in (b"1", b"2")])])

    def test_two_tasks_of_one_name_in_a_batch_are_a_mistake(self, store: Store) -> None:
        with pytest.raises(ValueError, match="same name"):
            store.tasks.ingest([offer(store, "rust"), offer(store, "RUST")])

    def test_a_hostile_name_is_refused(self, store: Store) -> None:
        with pytest.raises(InvalidName):
            ingest(store, "../rust")

    def test_bytes_that_are_not_in_the_store_are_not_referred_to(self, store: Store) -> None:
        final = replace(adapter(store, b"w", is_final=True), weights="ab" * 32)
        with pytest.raises(MissingBlob):
            store.tasks.ingest([TaskIngest("rust", BASE, [final])])
        assert names(store) == []

    def test_a_batch_is_recorded_whole_or_not_at_all(self, store: Store) -> None:
        ingest(store, "rust")
        with pytest.raises(TaskConflict):
            store.tasks.ingest([offer(store, "html"), offer(store, "rust", weights=b"other")])
        assert names(store) == ["rust"]


class TestConflict:
    """A task that exists with another adapter."""

    @pytest.mark.parametrize("other", [{"weights": b"other"}, {"base_model": "other/base", "base_is_told": True}])
    def test_it_fails_unless_told_otherwise(self, store: Store, other: dict[str, object]) -> None:
        ingest(store, "rust")
        with pytest.raises(TaskConflict, match="rust"):
            ingest(store, "rust", **other)
        assert store.blobs.read(store.tasks.final("rust").weights) == b"weights of rust"

    def test_the_same_adapter_keeps_the_base_model_that_it_has(self, store: Store) -> None:
        ingest(store, "rust")
        outcome = store.tasks.ingest([offer(store, "rust", base_model="other/base")])[0]
        assert (outcome.status, outcome.base_model, store.tasks.get("rust").base_model) == ("known", BASE, BASE)

    def test_skip_leaves_the_task_as_it_is(self, store: Store) -> None:
        ingest(store, "rust")
        outcome = store.tasks.ingest([offer(store, "rust", weights=b"other", on_conflict="skip")])[0]
        assert outcome.status == "skipped"
        assert store.blobs.read(store.tasks.final("rust").weights) == b"weights of rust"

    def test_replace_drops_all_that_was_derived_from_the_old_adapter(self, store: Store) -> None:
        ingest(store, "rust", steps=[80])
        store.vectors.add([vector(store, "rust")])
        made = store.generators.add(generator(store, ["rust"]))
        store.evaluations.add([evaluation("rust")])
        outcome = store.tasks.ingest([offer(store, "rust", weights=b"other", on_conflict="replace")])[0]
        assert (outcome.status, outcome.new) == ("replaced", 1)
        assert [store.blobs.read(a.weights) for a in store.tasks.adapters("rust")] == [b"other"]
        assert store.vectors.all("rust") == []
        assert store.codes.get("rust", made.id) is None
        assert store.evaluations.all("rust") == []


class TestTexts:
    """Samples and held-out texts."""

    def test_no_samples_keeps_those_that_are_there(self, store: Store) -> None:
        ingest(store, "rust", samples=b"samples")
        assert store.tasks.ingest([offer(store, "rust")])[0].status == "known"
        assert store.tasks.get("rust").samples == store.blobs.put(b"samples")

    def test_other_samples_make_the_vectors_of_the_old_ones_go(self, store: Store) -> None:
        ingest(store, "rust", samples=b"samples")
        store.vectors.add([vector(store, "rust")])
        assert store.tasks.ingest([offer(store, "rust", samples=b"other")])[0].status == "updated"
        assert store.vectors.all("rust") == []

    def test_other_held_out_texts_leave_the_vectors_alone(self, store: Store) -> None:
        ingest(store, "rust", eval_data=b"eval")
        store.vectors.add([vector(store, "rust")])
        assert store.tasks.ingest([offer(store, "rust", eval_data=b"other")])[0].status == "updated"
        assert len(store.vectors.all("rust")) == 1


class TestQueries:
    """Finding tasks."""

    def test_tasks_come_by_name_in_any_case(self, store: Store) -> None:
        for name in ("b", "C", "a"):
            ingest(store, name)
        assert names(store) == ["a", "b", "C"]

    def test_many_pages_are_read_without_gap_or_repetition(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(summaries, "_PAGE", 3)
        wanted = [f"task{n:02}" for n in range(10)]
        store.tasks.ingest([offer(store, name) for name in wanted])
        assert names(store) == wanted
        assert [summary.task.name for summary in store.tasks.summaries()] == wanted

    def test_a_slow_reader_does_not_hold_up_a_writer(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(summaries, "_PAGE", 1)
        store.tasks.ingest([offer(store, name) for name in ("a", "b")])
        reading = store.tasks.all()
        next(reading)
        with new_store(store.address, lock_timeout=0) as writer:
            ingest(writer, "c")
        assert [task.name for task in reading] == ["b"]

    def test_an_unknown_name_is_answered_with_the_closest(self, store: Store) -> None:
        ingest(store, "Shakespeare")
        with pytest.raises(TaskNotFound) as caught:
            store.tasks.get("shakespear")
        assert caught.value.matches == ("Shakespeare",)
        assert "Shakespeare" in (caught.value.hint or "")

    def test_an_unknown_name_with_nothing_close_points_to_the_list(self, store: Store) -> None:
        with pytest.raises(TaskNotFound) as caught:
            store.tasks.adapters("zzz")
        assert "icm ls" in (caught.value.hint or "")

    def test_a_summary_has_the_counts_and_the_code_of_the_current_generator(self, store: Store) -> None:
        ingest(store, "rust", steps=[80, 90])
        ingest(store, "html")
        store.vectors.add([vector(store, "rust", number) for number in range(3)])
        store.generators.add(generator(store, ["rust", "html"]))
        store.generators.add(generator(store, ["rust"], data=b"newer"))
        html, rust = store.tasks.summaries()
        assert (html.checkpoints, html.vectors, html.code) == (0, 0, None)
        assert (rust.checkpoints, rust.vectors) == (2, 3)
        assert rust.code is not None
        assert rust.code.bits == 8.0 * rust.code.size

    def test_tasks_without_vectors_are_named_in_order(self, store: Store) -> None:
        for name in ("rust", "html", "css"):
            ingest(store, name)
        store.vectors.add([vector(store, "html", 0)])
        found = store.tasks.without_vectors(["rust", "html", "css"])
        assert list(found.items()) == [("css", BASE), ("rust", BASE)]
        assert store.tasks.without_vectors(["html", "RUST"]) == {"rust": BASE}


class TestRemoval:
    """Forgetting a task."""

    def test_a_removed_task_is_gone_with_its_rows_and_its_bytes_stay_until_prune(self, store: Store) -> None:
        ingest(store, "rust")
        weights = store.tasks.final("rust").weights
        assert store.tasks.remove(["RUST"], last_copies=["RUST"])[0].name == "rust"
        assert names(store) == []
        assert store.blobs.read(weights) == b"weights of rust"

    def test_an_unknown_task_cannot_be_removed(self, store: Store) -> None:
        with pytest.raises(TaskNotFound):
            store.tasks.remove(["rust"], last_copies=["rust"])

    def test_no_task_goes_if_one_of_them_was_evicted_unknown_to_the_user(self, store: Store) -> None:
        for name in ("html", "rust", "sql"):
            ingest(store, name)
        store.generators.add(generator(store, ["rust", "sql"]))
        store.originals.evict(eviction(store, "rust"))
        with pytest.raises(LastCopy, match=r"'rust'.*only copy"):
            store.tasks.remove(["html", "rust"])
        assert names(store) == ["html", "rust", "sql"]
        assert [task.name for task in store.tasks.remove(["html", "RUST", "rust"], last_copies=["Rust"])] == [
            "html",
            "rust",
        ]
        assert names(store) == ["sql"]

    def test_no_task_goes_if_one_of_them_is_gone_already(self, store: Store) -> None:
        ingest(store, "rust")
        with pytest.raises(TaskNotFound):
            store.tasks.remove(["rust", "html"])
        assert names(store) == ["rust"]

    def test_removal_waits_for_others_that_use_the_store(self, store: Store) -> None:
        ingest(store, "rust")
        with new_store(store.address):
            pass
        store.tasks.remove(["rust"], last_copies=["rust"])


class TestBaseModels:
    """Base models."""

    def test_they_are_listed_with_the_number_of_their_tasks(self, store: Store) -> None:
        ingest(store, "rust")
        ingest(store, "html")
        store.base_models.set_path("other", "models/other")
        assert [(base.name, base.tasks, base.path) for base in store.base_models.all()] == [
            (BASE, 2, None),
            ("other", 0, "models/other"),
        ]

    def test_an_alias_can_be_changed_and_forgotten(self, store: Store) -> None:
        for path in ("one", "two", None):
            store.base_models.set_path(BASE, path)
            assert [base.path for base in store.base_models.all()] == [path]

    def test_the_facts_of_a_loaded_one_are_kept(self, store: Store) -> None:
        store.base_models.set_facts(BASE, fingerprint="f00d", shape={"layers": 30})
        (base,) = store.base_models.all()
        assert (base.fingerprint, base.shape) == ("f00d", {"layers": 30})


class TestHaving:
    """Finding adapters by what they are."""

    def test_every_task_with_the_same_bytes_is_found(self, store: Store) -> None:
        for name in ("rust", "twin"):
            ingest(store, name, weights=b"same", steps=[80])
        ingest(store, "other")
        final = store.tasks.final("rust")
        assert [row.task for row in store.tasks.having(final.weights, final.config)] == ["rust", "twin"]

    def test_a_checkpoint_is_found_too(self, store: Store) -> None:
        ingest(store, "rust", steps=[80])
        checkpoint = store.tasks.adapters("rust")[0]
        (found,) = store.tasks.having(checkpoint.weights, checkpoint.config)
        assert (found.id, found.is_final) == (checkpoint.id, False)

    def test_both_digests_have_to_match(self, store: Store) -> None:
        ingest(store, "rust")
        final = store.tasks.final("rust")
        assert store.tasks.having(final.weights, final.weights) == []
        assert store.tasks.having("0" * 64, final.config) == []

    def test_an_evicted_adapter_is_still_known(self, store: Store) -> None:
        ingest(store, "rust")
        store.generators.add(generator(store, ["rust"]))
        store.originals.evict(eviction(store, "rust"))
        final = store.tasks.final("rust")
        assert [row.is_evicted for row in store.tasks.having(final.weights, final.config)] == [True]
