"""Task vectors, generators, codes and evaluations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import MissingBlob, TaskNotFound
from registry.store import Store
from tests.registry.examples import BASE, EXTRACTOR, code, evaluation, generator, ingest, vector


@pytest.fixture(autouse=True)
def two_tasks(store: Store) -> None:
    """Every test here begins with two tasks."""
    ingest(store, "rust")
    ingest(store, "html")


class TestVectors:
    """Task vectors."""

    def test_they_come_back_as_they_were_recorded(self, store: Store) -> None:
        store.add_vectors([vector(store, "rust", 1), vector(store, "rust", 0)])
        first, second = store.vectors("rust")
        assert (first.support_set, second.support_set) == (0, 1)
        assert (first.task, first.view, first.extractor, first.dim) == ("rust", "context", EXTRACTOR, 64)
        assert store.vectors("html") == []

    def test_those_of_all_tasks_come_by_task(self, store: Store) -> None:
        store.add_vectors([vector(store, "rust", 1), vector(store, "rust", 0), vector(store, "html")])
        assert [(row.task, row.support_set) for row in store.vectors()] == [("html", 0), ("rust", 0), ("rust", 1)]

    def test_the_same_again_changes_nothing(self, store: Store) -> None:
        assert store.add_vectors([vector(store, "rust")]) == 1
        before = store.vectors("rust")
        assert store.add_vectors([vector(store, "rust")]) == 0
        assert store.vectors("rust") == before

    def test_other_bytes_take_the_place_of_the_earlier_ones(self, store: Store) -> None:
        store.add_vectors([vector(store, "rust")])
        assert store.add_vectors([vector(store, "rust", data=b"better")]) == 1
        assert [store.read_blob(found.blob) for found in store.vectors("rust")] == [b"better"]

    def test_another_extractor_makes_another_vector(self, store: Store) -> None:
        one = vector(store, "rust")
        store.add_vectors([one, replace(one, extractor={**EXTRACTOR, "version": 2})])
        assert len(store.vectors("rust")) == 2

    def test_a_vector_of_an_unknown_task_is_refused_with_all_others(self, store: Store) -> None:
        with pytest.raises(TaskNotFound):
            store.add_vectors([vector(store, "rust"), vector(store, "gone")])
        assert store.vectors("rust") == []


class TestGenerators:
    """Generators and their codes."""

    def test_there_is_none_at_first(self, store: Store) -> None:
        assert store.current_generator(BASE) is None

    def test_the_newest_is_the_current_one_and_versions_count_up(self, store: Store) -> None:
        first = store.add_generator(generator(store))
        second = store.add_generator(generator(store, data=b"newer", parent_id=first.id))
        assert (first.version, second.version, second.parent_id) == (1, 2, first.id)
        assert store.current_generator(BASE) == second
        assert [made.is_current for made in store.generators(BASE)] == [False, True]

    def test_it_comes_back_with_its_configuration_and_size(self, store: Store) -> None:
        made = store.add_generator(generator(store))
        assert (made.config, made.metrics, made.size) == ({"quality": 4}, {"bits": 1.5}, len(b"generator"))
        assert store.read_blob(made.blob) == b"generator"

    def test_each_base_model_has_its_own(self, store: Store) -> None:
        store.add_generator(generator(store))
        other = store.add_generator(replace(generator(store, data=b"other"), base_model="other"))
        assert other.version == 1
        assert len(store.generators()) == 2
        assert store.generators("other") == [other]

    def test_its_codes_are_recorded_with_it(self, store: Store) -> None:
        made = store.add_generator(generator(store, ["rust", "html"]))
        assert [found.task for found in store.codes(made.id)] == ["html", "rust"]
        found = store.code("rust", made.id)
        assert found is not None
        assert (found.adapter_id, found.bits, found.dw_error) == (store.final_adapter("rust").id, 80.5, 0.01)
        assert found.size == len(store.read_blob(found.blob))

    def test_a_task_without_a_code_has_none(self, store: Store) -> None:
        made = store.add_generator(generator(store, ["rust"]))
        assert store.code("html", made.id) is None

    def test_a_code_that_cannot_be_recorded_keeps_the_present_generator(self, store: Store) -> None:
        made = store.add_generator(generator(store, ["rust"]))
        bad = replace(code(store, "html"), blob="ab" * 32)
        with pytest.raises(MissingBlob):
            store.add_generator(replace(generator(store, ["rust"], data=b"newer"), codes=[code(store, "rust"), bad]))
        assert store.current_generator(BASE) == made
        assert store.generators() == [made]

    def test_a_code_of_a_task_that_was_removed_meanwhile_is_left_out(self, store: Store) -> None:
        ingest(store, "html")
        new = generator(store, ["rust", "html"])
        store.remove_task("rust")
        assert [code.task for code in store.codes(store.add_generator(new).id)] == ["html"]

    def test_a_code_of_an_adapter_that_was_replaced_meanwhile_is_left_out(self, store: Store) -> None:
        ingest(store, "html")
        new = generator(store, ["html"])
        ingest(store, "html", weights=b"other weights", on_conflict="replace")
        assert store.final_adapter("html").id == new.codes[0].adapter.id  # numbers of rows are given again
        assert store.codes(store.add_generator(new).id) == []


class TestEvaluations:
    """Measurements."""

    def test_they_come_back_as_they_were_recorded(self, store: Store) -> None:
        store.add_evaluations([evaluation("rust")])
        (found,) = store.evaluations("rust")
        assert (found.nats_per_token, found.tokens, found.utf8_bytes, found.retained_gain) == (2.0, 100, 400, 0.97)
        assert (found.rung, found.metric, found.settings) == ("original", "nll", {"max_tokens": 256})

    def test_the_latest_of_the_same_thing_wins(self, store: Store) -> None:
        store.add_evaluations([evaluation("rust", nats=2.0), evaluation("rust", nats=1.9)])
        store.add_evaluations([evaluation("rust", nats=1.8)])
        assert [found.nats_per_token for found in store.evaluations()] == [1.8]

    def test_rungs_of_different_generators_stand_side_by_side(self, store: Store) -> None:
        one = store.add_generator(generator(store))
        two = store.add_generator(generator(store, data=b"newer"))
        store.add_evaluations([evaluation("rust", generator_id=made.id) for made in (one, two)])
        assert [found.generator_id for found in store.evaluations("rust")] == [one.id, two.id]

    def test_all_are_listed_by_task(self, store: Store) -> None:
        store.add_evaluations([evaluation("rust"), evaluation("html")])
        assert [found.task for found in store.evaluations()] == ["html", "rust"]

    def test_an_unknown_task_is_refused(self, store: Store) -> None:
        with pytest.raises(TaskNotFound):
            store.add_evaluations([evaluation("gone")])
