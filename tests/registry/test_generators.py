"""Generators that continue others, and going back to one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import GeneratorConflict, GeneratorNotFound, LastCopy, MissingBlob
from registry.records import Asked, GeneratorRecord, NewResidual
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


def drop(store: Store, digest: str) -> None:
    """Refer to bytes and let go of them, as any command may for which the very same came out."""
    current = store.generators.current(BASE)
    assert current is not None
    store.generators.set_start(current.id, digest)
    store.generators.set_start(current.id, store.blobs.put(b"another start"))
    assert not store.paths.blob(digest).exists()


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


@pytest.mark.parametrize("how", ["add_codes", "extend_generator", "add_generator"])
def test_codes_whose_bytes_others_dropped_are_stored_again(
    store: Store, twin: Store, first: GeneratorRecord, how: str
) -> None:
    new = replace(code(store, "html", data=b"code"), data=b"code")
    drop(twin, new.blob)
    if how == "add_codes":
        store.codes.add(first.id, [new])
    else:
        getattr(store, how)(replace(generator(store, data=b"newer", parent_id=first.id), codes=[new]))
    assert store.blobs.read(code_of(store, "html").blob) == b"code"
    assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == []


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
        before = store.codes.replace_residual(code_of(store, "rust"), new, Asked(max_error=0.01))
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
        assert not store.paths.blob(first.blob).exists()
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

    def test_another_one_that_got_its_number_meanwhile_stays(self, store: Store, first: GeneratorRecord) -> None:
        confirmed = extend(store, first, "html")
        store.generators.make_current(first.id)
        store.generators.forget(confirmed)
        other = store.generators.add(generator(store, ["rust"], data=b"trained meanwhile"))
        store.generators.make_current(first.id)
        assert (other.id, other.version) == (confirmed.id, confirmed.version)
        with pytest.raises(GeneratorNotFound, match=f"{confirmed.blob[:12]} was forgotten meanwhile"):
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
