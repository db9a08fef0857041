"""Task vectors, generators, codes and evaluations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import CodeChanged, MissingBlob, TaskNotFound
from registry.evaluations import Subject
from registry.records import Asked, NewResidual, TaskSummary
from registry.store import Store
from tests.registry.examples import BASE, EXTRACTOR, code, code_of, evaluation, generator, ingest, vector


@pytest.fixture(autouse=True)
def two_tasks(store: Store) -> None:
    """Every test here begins with two tasks."""
    ingest(store, "rust")
    ingest(store, "html")


def summary(store: Store, task: str) -> TaskSummary:
    """Return what the store has of a task."""
    return next(row for row in store.tasks.summaries() if row.task.name == task)


class TestVectors:
    """Task vectors."""

    def test_they_come_back_as_they_were_recorded(self, store: Store) -> None:
        store.vectors.add([vector(store, "rust", 1), vector(store, "rust", 0)])
        first, second = store.vectors.all("rust")
        assert (first.support_set, second.support_set) == (0, 1)
        assert (first.task, first.view, first.extractor, first.dim) == ("rust", "context", EXTRACTOR, 64)
        assert store.vectors.all("html") == []

    def test_those_of_all_tasks_come_by_task(self, store: Store) -> None:
        store.vectors.add([vector(store, "rust", 1), vector(store, "rust", 0), vector(store, "html")])
        assert [(row.task, row.support_set) for row in store.vectors.all()] == [("html", 0), ("rust", 0), ("rust", 1)]

    def test_the_same_again_changes_nothing(self, store: Store) -> None:
        assert store.vectors.add([vector(store, "rust")]) == 1
        before = store.vectors.all("rust")
        assert store.vectors.add([vector(store, "rust")]) == 0
        assert store.vectors.all("rust") == before

    def test_other_bytes_take_the_place_of_the_earlier_ones(self, store: Store) -> None:
        store.vectors.add([vector(store, "rust")])
        assert store.vectors.add([vector(store, "rust", data=b"better")]) == 1
        assert [store.blobs.read(found.blob) for found in store.vectors.all("rust")] == [b"better"]

    def test_another_extractor_makes_another_vector(self, store: Store) -> None:
        one = vector(store, "rust")
        store.vectors.add([one, replace(one, extractor={**EXTRACTOR, "version": 2})])
        assert len(store.vectors.all("rust")) == 2

    def test_a_vector_of_an_unknown_task_is_refused_with_all_others(self, store: Store) -> None:
        with pytest.raises(TaskNotFound):
            store.vectors.add([vector(store, "rust"), vector(store, "gone")])
        assert store.vectors.all("rust") == []

    def test_of_a_task_that_is_as_it_was_they_are_recorded(self, store: Store) -> None:
        assert store.vectors.add([vector(store, "rust")], of=summary(store, "rust")) == 1

    def test_of_an_adapter_that_was_replaced_meanwhile_they_are_refused(self, store: Store) -> None:
        ingest(store, "zig")
        seen = summary(store, "zig")
        ingest(store, "zig", weights=b"other weights", on_conflict="replace")
        assert store.tasks.final("zig").id == seen.final.id  # numbers of rows are given again
        with pytest.raises(CodeChanged):
            store.vectors.add([vector(store, "zig")], of=seen)
        assert store.vectors.all("zig") == []

    def test_of_samples_that_were_replaced_meanwhile_they_are_refused(self, store: Store) -> None:
        seen = summary(store, "rust")
        ingest(store, "rust", samples=b'{"text": "new"}\n')
        with pytest.raises(CodeChanged):
            store.vectors.add([vector(store, "rust")], of=seen)
        assert store.vectors.all("rust") == []


class TestGenerators:
    """Generators and their codes."""

    def test_there_is_none_at_first(self, store: Store) -> None:
        assert store.generators.current(BASE) is None

    def test_the_newest_is_the_current_one_and_versions_count_up(self, store: Store) -> None:
        first = store.generators.add(generator(store))
        second = store.generators.add(generator(store, data=b"newer", parent_id=first.id))
        assert (first.version, second.version, second.parent_id) == (1, 2, first.id)
        assert store.generators.current(BASE) == second
        assert [made.is_current for made in store.generators.all(BASE)] == [False, True]

    def test_it_comes_back_with_its_configuration_and_size(self, store: Store) -> None:
        made = store.generators.add(generator(store))
        assert (made.config, made.metrics, made.size) == ({"quality": 4}, {"bits": 1.5}, len(b"generator"))
        assert store.blobs.read(made.blob) == b"generator"

    def test_each_base_model_has_its_own(self, store: Store) -> None:
        store.generators.add(generator(store))
        other = store.generators.add(replace(generator(store, data=b"other"), base_model="other"))
        assert other.version == 1
        assert len(store.generators.all()) == 2
        assert store.generators.all("other") == [other]

    def test_its_codes_are_recorded_with_it(self, store: Store) -> None:
        made = store.generators.add(generator(store, ["rust", "html"]))
        assert [found.task for found in store.codes.all(made.id)] == ["html", "rust"]
        found = store.codes.get("rust", made.id)
        assert found is not None
        assert (found.adapter_id, found.bits, found.dw_error) == (store.tasks.final("rust").id, 80.5, 0.01)
        assert found.size == len(store.blobs.read(found.blob))

    def test_a_task_without_a_code_has_none(self, store: Store) -> None:
        made = store.generators.add(generator(store, ["rust"]))
        assert store.codes.get("html", made.id) is None

    def test_a_code_that_cannot_be_recorded_keeps_the_present_generator(self, store: Store) -> None:
        made = store.generators.add(generator(store, ["rust"]))
        bad = replace(code(store, "html"), blob="ab" * 32)
        with pytest.raises(MissingBlob):
            store.generators.add(replace(generator(store, ["rust"], data=b"newer"), codes=[code(store, "rust"), bad]))
        assert store.generators.current(BASE) == made
        assert store.generators.all() == [made]

    def test_a_code_of_a_task_that_was_removed_meanwhile_is_left_out(self, store: Store) -> None:
        ingest(store, "html")
        new = generator(store, ["rust", "html"])
        store.tasks.remove_one("rust")
        assert [code.task for code in store.codes.all(store.generators.add(new).id)] == ["html"]

    def test_a_code_of_an_adapter_that_was_replaced_meanwhile_is_left_out(self, store: Store) -> None:
        ingest(store, "html")
        new = generator(store, ["html"])
        ingest(store, "html", weights=b"other weights", on_conflict="replace")
        assert store.tasks.final("html").id == new.codes[0].adapter.id  # numbers of rows are given again
        assert store.codes.all(store.generators.add(new).id) == []


class TestEvaluations:
    """Measurements."""

    def test_they_come_back_as_they_were_recorded(self, store: Store) -> None:
        store.evaluations.add([evaluation("rust")])
        (found,) = store.evaluations.all("rust")
        assert (found.nats_per_token, found.tokens, found.utf8_bytes, found.retained_gain) == (2.0, 100, 400, 0.97)
        assert (found.rung, found.metric, found.settings) == ("original", "nll", {"max_tokens": 256})

    def test_the_latest_of_the_same_thing_wins(self, store: Store) -> None:
        store.evaluations.add([evaluation("rust", nats=2.0), evaluation("rust", nats=1.9)])
        store.evaluations.add([evaluation("rust", nats=1.8)])
        assert [found.nats_per_token for found in store.evaluations.all()] == [1.8]

    def test_rungs_of_different_generators_stand_side_by_side(self, store: Store) -> None:
        one = store.generators.add(generator(store))
        two = store.generators.add(generator(store, data=b"newer"))
        store.evaluations.add([evaluation("rust", generator_id=made.id) for made in (one, two)])
        assert [found.generator_id for found in store.evaluations.all("rust")] == [one.id, two.id]

    def test_all_are_listed_by_task(self, store: Store) -> None:
        store.evaluations.add([evaluation("rust"), evaluation("html")])
        assert [found.task for found in store.evaluations.all()] == ["html", "rust"]

    def test_an_unknown_task_is_refused(self, store: Store) -> None:
        with pytest.raises(TaskNotFound):
            store.evaluations.add([evaluation("gone")])

    @pytest.fixture
    def coded(self, store: Store) -> Subject:
        """What there is of `zig`, which has a code with a residual."""
        ingest(store, "zig")
        made = store.generators.add(generator(store, ["zig"]))
        residual = NewResidual(store.blobs.put(b"residual"), 0.001)
        with_residual = store.codes.replace_residual(code_of(store, "zig"), residual, Asked())
        return Subject(store.tasks.final("zig"), made, with_residual)

    def recorded(self, store: Store, of: Subject) -> list[str]:
        """Offer a measurement of every rung, and return those that were taken."""
        number = None if of.generator is None else of.generator.id
        alone = [replace(evaluation("zig"), rung=rung) for rung in ("base", "original")]
        made = [replace(evaluation("zig", generator_id=number), rung=rung) for rung in ("residual", "code", "generate")]
        count = store.evaluations.add([*alone, *made], of=of)
        taken = sorted(row.rung for row in store.evaluations.all("zig"))
        assert len(taken) == count
        return taken

    def test_of_what_is_as_it_was_all_are_recorded(self, store: Store, coded: Subject) -> None:
        assert self.recorded(store, coded) == ["base", "code", "generate", "original", "residual"]

    def test_of_a_code_that_was_replaced_meanwhile_none_is_recorded(self, store: Store, coded: Subject) -> None:
        assert coded.generator is not None
        store.codes.replace(coded.generator.id, code(store, "zig", data=b"finer"))
        assert self.recorded(store, coded) == ["base", "generate", "original"]

    def test_of_a_residual_that_was_replaced_meanwhile_none_is_recorded(self, store: Store, coded: Subject) -> None:
        store.codes.replace_residual(code_of(store, "zig"), None, Asked())
        assert self.recorded(store, coded) == ["base", "generate", "original"]

    def test_of_an_adapter_that_was_replaced_meanwhile_none_is_recorded(self, store: Store, coded: Subject) -> None:
        ingest(store, "zig", weights=b"other weights", on_conflict="replace")
        assert store.tasks.final("zig").id == coded.final.id
        assert self.recorded(store, coded) == ["base"]

    def test_of_a_generator_that_is_not_current_any_more_all_are_recorded(self, store: Store, coded: Subject) -> None:
        store.generators.add(generator(store, ["zig"], data=b"newer"))
        assert self.recorded(store, coded) == ["base", "code", "generate", "original", "residual"]

    def test_of_a_generator_whose_number_another_one_has_none_is_recorded(self, store: Store, coded: Subject) -> None:
        assert coded.generator is not None
        earlier = Subject(coded.final, replace(coded.generator, blob="cd" * 32), coded.code)
        assert self.recorded(store, earlier) == ["base", "original"]
