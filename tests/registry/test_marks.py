"""What people say of a task: its name, its tags, its note."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidName, TaskConflict, TaskNotFound
from registry.names import MAX_NOTE, check_note, check_tag
from registry.store import Store
from tests.registry.examples import code, evaluation, generator, ingest, offer, vector


class TestRename:
    """Another name for the same task."""

    def test_everything_of_the_task_stays_with_it(self, store: Store) -> None:
        ingest(store, "rust", steps=[80], samples=b"samples")
        store.vectors.add([vector(store, "rust")])
        made = store.generators.add(generator(store, ["rust"]))
        store.evaluations.add([evaluation("rust", generator_id=made.id)])
        store.tasks.edit(["rust"], pinned=True)
        before = [adapter.weights for adapter in store.tasks.adapters("rust")]
        assert store.tasks.edit(["RUST"], name="oxide")[0].name == "oxide"
        assert [adapter.weights for adapter in store.tasks.adapters("oxide")] == before
        assert store.tasks.get("oxide").pinned
        assert [found.task for found in store.vectors.all("oxide")] == ["oxide"]
        assert [found.task for found in store.evaluations.all("oxide")] == ["oxide"]
        assert store.codes.get("oxide", made.id) is not None
        with pytest.raises(TaskNotFound):
            store.tasks.get("rust")

    def test_a_name_that_another_task_has_is_refused_in_any_case(self, store: Store) -> None:
        ingest(store, "rust")
        ingest(store, "html")
        with pytest.raises(TaskConflict, match="there is already a task named 'html'"):
            store.tasks.edit(["rust"], name="HTML")
        assert store.tasks.names() == ["html", "rust"]

    def test_only_the_case_can_change(self, store: Store) -> None:
        ingest(store, "rust")
        assert store.tasks.edit(["rust"], name="Rust")[0].name == "Rust"
        assert store.tasks.edit(["Rust"], name="Rust")[0].name == "Rust"

    @pytest.mark.parametrize("name", ["", "a/b", "-x", "nul", "x" * 129, "a\u202eb"])
    def test_a_name_follows_the_rule(self, store: Store, name: str) -> None:
        ingest(store, "rust")
        with pytest.raises(InvalidName):
            store.tasks.edit(["rust"], name=name)
        assert store.tasks.names() == ["rust"]

    def test_the_old_name_is_free_again(self, store: Store) -> None:
        ingest(store, "rust")
        store.tasks.edit(["rust"], name="oxide")
        ingest(store, "rust", weights=b"another adapter")
        assert store.tasks.names() == ["oxide", "rust"]

    def test_a_task_that_is_renamed_while_it_is_trained_gets_its_code(self, store: Store) -> None:
        ingest(store, "rust")
        new = generator(store, ["rust"])  # as it was read when the training began
        store.tasks.edit(["rust"], name="oxide")
        made = store.generators.add(new)
        assert store.codes.get("oxide", made.id) is not None

    def test_a_code_is_left_out_if_the_number_of_its_adapter_has_other_bytes_now(self, store: Store) -> None:
        ingest(store, "rust")
        made = store.generators.add(generator(store))
        new = code(store, "rust")
        store.tasks.remove(["rust"], last_copies=["rust"])
        ingest(store, "oxide", weights=b"other weights")
        assert store.codes.add(made.id, [new]) == []


class TestTags:
    """Words to find a task by."""

    def test_tags_are_added_and_removed_in_one_step(self, store: Store) -> None:
        ingest(store, "rust")
        store.tasks.edit(["rust"], add_tags=["trial", "prod"])
        (task,) = store.tasks.edit(["rust"], add_tags=["team/search"], remove_tags=["trial"])
        assert task.tags == ("prod", "team/search")
        assert store.tasks.get("rust").tags == ("prod", "team/search")

    def test_the_first_spelling_of_a_tag_stays(self, store: Store) -> None:
        ingest(store, "rust")
        store.tasks.edit(["rust"], add_tags=["Prod"])
        assert store.tasks.edit(["rust"], add_tags=["prod"])[0].tags == ("Prod",)
        assert store.tasks.edit(["rust"], remove_tags=["PROD"])[0].tags == ()

    def test_if_one_task_is_unknown_none_gets_the_tag(self, store: Store) -> None:
        ingest(store, "rust")
        with pytest.raises(TaskNotFound):
            store.tasks.edit(["rust", "html"], add_tags=["prod"])
        assert store.tasks.get("rust").tags == ()

    def test_tags_are_counted_in_any_case(self, store: Store) -> None:
        for name in ("rust", "html", "sql"):
            ingest(store, name)
        store.tasks.edit(["rust", "RUST", "sql"], add_tags=["prod", "big"])
        store.tasks.edit(["html"], add_tags=["Prod"])
        counted = {tag.lower(): number for tag, number in store.tasks.tags().items()}
        assert counted == {"big": 2, "prod": 3}

    @pytest.mark.parametrize("tag", ["", "a b", "-x", "ü", "a,b", "x" * 65, "a\nb"])
    def test_a_tag_follows_the_rule(self, store: Store, tag: str) -> None:
        ingest(store, "rust")
        with pytest.raises(InvalidName, match="is not a valid tag"):
            store.tasks.edit(["rust"], add_tags=["prod", tag])
        assert store.tasks.get("rust").tags == ()

    @given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@=+-]{0,63}", fullmatch=True))
    def test_plain_words_are_tags(self, tag: str) -> None:
        assert check_tag(tag) == tag


class TestNotes:
    """A text to remember."""

    def test_a_note_is_kept_replaced_and_removed(self, store: Store) -> None:
        ingest(store, "rust")
        assert store.tasks.get("rust").note is None
        assert store.tasks.edit(["rust"], note=" for the demo\n")[0].note == "for the demo"
        assert store.tasks.edit(["rust"], note="two\nlines")[0].note == "two\nlines"
        assert store.tasks.edit(["rust"], note=False)[0].note is None

    @pytest.mark.parametrize("text", ["", "  ", "x" * (MAX_NOTE + 1), "\udc80", "a\0b"])
    def test_what_is_not_a_note_is_refused(self, text: str) -> None:
        with pytest.raises(InvalidName, match="the note is not valid"):
            check_note(text)


def test_a_replaced_adapter_leaves_tags_and_note_as_they_are(store: Store) -> None:
    ingest(store, "rust")
    store.tasks.edit(["rust"], add_tags=["prod"])
    store.tasks.edit(["rust"], note="the good one")
    store.tasks.edit(["rust"], pinned=True)
    outcome = store.tasks.ingest([offer(store, "rust", weights=b"trained again", on_conflict="replace")])[0]
    task = store.tasks.get("rust")
    assert (outcome.status, task.tags, task.note, task.pinned) == ("replaced", ("prod",), "the good one", True)
