"""Generators that continue others, and going back to one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import GeneratorConflict, GeneratorNotFound, LastCopy, MissingBlob
from registry.records import CodeLimits, GeneratorRecord, NewResidual
from registry.store import Store
from tests.registry.examples import BASE, code, code_of, evaluation, eviction, generator, ingest


@pytest.fixture
def first(store: Store) -> GeneratorRecord:
    """Two tasks, of which one has a code."""
    ingest(store, "rust")
    ingest(store, "html")
    return store.generators.add(generator(store, ["rust"]))


def extend(store: Store, parent: GeneratorRecord, *tasks: str, data: bytes = b"longer") -> GeneratorRecord:
    return store.generators.extend(generator(store, tasks, data=data, parent_id=parent.id))


def use_of(store: Store, made: GeneratorRecord) -> tuple[tuple[str, ...], tuple[str, ...]]:
    (use,) = [use for use in store.generators.uses() if use.generator.id == made.id]
    return use.tasks, use.last_copies


class TestAdding:
    """A generator with its codes."""

    @pytest.fixture(autouse=True)
    def two_tasks(self, store: Store) -> None:
        """Every test here begins with two tasks."""
        ingest(store, "rust")
        ingest(store, "html")

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
        facts = (found.adapter_id, found.bits, found.squared_error)
        assert facts == (store.tasks.final("rust").id, 8.0 * found.size, 0.01)
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
        store.tasks.remove(["rust"], last_copies=["rust"])
        assert [code.task for code in store.codes.all(store.generators.add(new).id)] == ["html"]

    @pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
    def test_a_code_of_an_adapter_that_was_replaced_meanwhile_is_left_out(self, store: Store) -> None:
        ingest(store, "html")
        new = generator(store, ["html"])
        ingest(store, "html", weights=b"other weights", on_conflict="replace")
        assert store.tasks.final("html").id == new.codes[0].adapter.id  # numbers of rows are given again
        assert store.codes.all(store.generators.add(new).id) == []


class TestAddingCodes:
    """Codes of further tasks under the generator that is there."""

    def test_they_stand_beside_those_that_are_there(self, store: Store, first: GeneratorRecord) -> None:
        (recorded,) = store.codes.add(first.id, [code(store, "html")])
        assert store.codes.all(first.id) == [recorded, code_of(store, "rust")]
        assert store.generators.all() == [first]

    def test_a_task_that_has_one_keeps_it(self, store: Store, first: GeneratorRecord) -> None:
        before = code_of(store, "rust")
        assert store.codes.add(first.id, [code(store, "rust", data=b"another")]) == []
        assert code_of(store, "rust") == before

    def test_all_are_recorded_or_none(self, store: Store, first: GeneratorRecord) -> None:
        ingest(store, "sql")
        bad = replace(code(store, "sql"), blob="ab" * 32)
        with pytest.raises(MissingBlob):
            store.codes.add(first.id, [code(store, "html"), bad])
        assert [found.task for found in store.codes.all(first.id)] == ["rust"]

    def test_a_generator_that_is_not_current_any_more_gets_none(self, store: Store, first: GeneratorRecord) -> None:
        store.generators.add(generator(store, ["rust"], data=b"newer"))
        with pytest.raises(GeneratorConflict):
            store.codes.add(first.id, [code(store, "html")])
        assert store.codes.get("html", first.id) is None


class TestExtending:
    """A generator that decodes every code of its parent."""

    def test_it_has_all_codes_of_its_parent_and_the_new_ones(self, store: Store, first: GeneratorRecord) -> None:
        before = code_of(store, "rust")
        made = extend(store, first, "html")
        assert store.generators.current(BASE) == made
        assert (made.version, made.parent_id) == (2, first.id)
        assert [found.task for found in store.codes.all(made.id)] == ["html", "rust"]
        assert replace(code_of(store, "rust"), id=before.id, generator_id=first.id) == before

    def test_residuals_and_what_was_asked_are_linked_too(self, store: Store, first: GeneratorRecord) -> None:
        new = NewResidual(store.blobs.put(b"residual"), 0.001)
        before = store.codes.replace_residual(code_of(store, "rust"), new, CodeLimits(max_error=0.1))
        extend(store, first, "html")
        after = code_of(store, "rust")
        assert (after.residual, after.asked) == (before.residual, before.asked)

    def test_what_was_measured_of_the_codes_is_known_of_both(self, store: Store, first: GeneratorRecord) -> None:
        store.evaluations.add([evaluation("rust"), evaluation("rust", generator_id=first.id)])
        made = extend(store, first, "html")
        found = {(row.rung, row.generator_id) for row in store.evaluations.all("rust")}
        assert found == {("original", None), ("code", first.id), ("code", made.id)}

    def test_a_new_code_of_a_task_takes_the_place_of_the_linked_one(self, store: Store, first: GeneratorRecord) -> None:
        new = replace(generator(store, data=b"longer", parent_id=first.id), codes=[code(store, "rust", data=b"new")])
        made = store.generators.extend(new)
        assert [store.blobs.read(found.blob) for found in store.codes.all(made.id)] == [b"new"]

    @pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
    def test_it_works_with_tasks_whose_originals_are_gone(self, store: Store, first: GeneratorRecord) -> None:
        store.originals.evict(eviction(store, "rust"))
        extend(store, first, "html")
        assert code_of(store, "rust").size > 0
        assert list(store.verify(read_data=True)) == []

    def test_the_code_of_an_evicted_task_is_not_replaced(self, store: Store, first: GeneratorRecord) -> None:
        store.originals.evict(eviction(store, "rust"))
        new = replace(generator(store, data=b"longer", parent_id=first.id), codes=[code(store, "rust", data=b"new")])
        with pytest.raises(LastCopy, match="'rust'"):
            store.generators.extend(new)
        assert store.generators.all() == [first]

    def test_a_parent_that_is_not_current_any_more_is_not_continued(self, store: Store, first: GeneratorRecord) -> None:
        newer = store.generators.add(generator(store, ["rust"], data=b"newer"))
        with pytest.raises(GeneratorConflict):
            extend(store, first, "html")
        assert store.generators.current(BASE) == newer


class TestGoingBack:
    """Making another generator the current one."""

    def test_an_earlier_generator_answers_again(self, store: Store, first: GeneratorRecord) -> None:
        extend(store, first, "html")
        assert store.generators.make_current(first.id) == ["html"]
        assert store.generators.current(BASE) == first

    def test_and_a_later_one_too(self, store: Store, first: GeneratorRecord) -> None:
        made = extend(store, first, "html")
        store.generators.make_current(first.id)
        assert store.generators.make_current(made.id) == []
        assert store.generators.current(BASE) == made

    def test_the_current_one_again_changes_nothing(self, store: Store, first: GeneratorRecord) -> None:
        assert store.generators.make_current(first.id) == []
        assert store.generators.current(BASE) == first

    def test_it_is_refused_where_an_evicted_task_has_no_code(self, store: Store, first: GeneratorRecord) -> None:
        made = extend(store, first, "html")
        store.originals.evict(eviction(store, "html"))
        with pytest.raises(LastCopy, match="'html'"):
            store.generators.make_current(first.id)
        assert store.generators.current(BASE) == made

    def test_it_is_refused_where_an_evicted_task_has_another_code(self, store: Store, first: GeneratorRecord) -> None:
        made = extend(store, first, "html")
        store.codes.replace(made.id, code(store, "rust", data=b"the one that was checked"))
        store.originals.evict(eviction(store, "rust"))
        with pytest.raises(LastCopy, match="'rust'"):
            store.generators.make_current(first.id)

    def test_an_unknown_generator_is_an_error(self, store: Store) -> None:
        with pytest.raises(GeneratorNotFound):
            store.generators.make_current(7)


class TestForgetting:
    """Forgetting a generator."""

    def test_it_goes_with_its_codes_and_leaves_those_of_the_one_that_continues_it(
        self, store: Store, first: GeneratorRecord
    ) -> None:
        made = extend(store, first, "html")
        assert store.generators.forget(first) == 1
        assert store.generators.all() == [replace(made, parent_id=None)]
        store.prune(grace=0)
        assert not store.blobs.exists(first.blob)
        assert store.blobs.read(code_of(store, "rust").blob)
        assert list(store.verify(read_data=True)) == []

    def test_the_current_one_stays(self, store: Store, first: GeneratorRecord) -> None:
        with pytest.raises(GeneratorConflict, match="in use"):
            store.generators.forget(first)
        assert store.generators.all() == [first]

    def test_one_that_is_gone_already_is_an_error(self, store: Store, first: GeneratorRecord) -> None:
        extend(store, first, "html")
        store.generators.forget(first)
        with pytest.raises(GeneratorNotFound):
            store.generators.forget(first)

    @pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
    def test_another_one_that_got_its_number_meanwhile_stays(self, store: Store, first: GeneratorRecord) -> None:
        confirmed = extend(store, first, "html")
        store.generators.make_current(first.id)
        store.generators.forget(confirmed)
        other = store.generators.add(generator(store, ["rust"], data=b"trained meanwhile"))
        store.generators.make_current(first.id)
        assert (other.id, other.version) == (confirmed.id, confirmed.version)
        with pytest.raises(GeneratorNotFound, match=f"{confirmed.blob[:12]} was removed by another process"):
            store.generators.forget(confirmed)
        assert [made.blob for made in store.generators.all()] == [first.blob, other.blob]

    def test_one_that_became_current_and_went_back_since_is_still_the_same(
        self, store: Store, first: GeneratorRecord
    ) -> None:
        made = extend(store, first, "html")
        store.generators.make_current(first.id)
        assert store.generators.forget(made) == 2


class TestWhatDependsOnIt:
    """What a listing says of generators."""

    def test_an_evicted_task_depends_on_the_one_generator_that_has_its_code(
        self, store: Store, first: GeneratorRecord
    ) -> None:
        made = extend(store, first, "html")
        for task in ("rust", "html"):
            store.originals.evict(eviction(store, task))
        assert use_of(store, first) == (("rust",), ())
        assert use_of(store, made) == (("html", "rust"), ("html",))

    def test_another_code_elsewhere_is_not_the_one_that_was_checked(self, store: Store, first: GeneratorRecord) -> None:
        made = extend(store, first, "html")
        store.codes.replace(made.id, code(store, "rust", data=b"the one that was checked"))
        store.originals.evict(eviction(store, "rust"))
        assert use_of(store, first)[1] == ()
        assert use_of(store, made)[1] == ("rust",)
        store.generators.forget(first)
        assert store.blobs.read(code_of(store, "rust").blob) == b"the one that was checked"
