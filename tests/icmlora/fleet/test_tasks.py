"""`Fleet.tasks`, `show`, `plan_removal` and `remove`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from icmlora import DataError, Fleet, LastCopy, StoreNotFound, TaskConflict, TaskNotFound
from registry.store import Store
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, damage, equal, files_of, has_blob, is_sound
from tests.icmlora.tiny_base import LABEL


def names(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks()]


def test_a_listing_says_what_each_task_has(fleet: Fleet) -> None:
    rows = {row.name: row for row in fleet.tasks()}
    assert {name: rows[name].checkpoints for name in TASKS} == {"poems": 2, "rules": 0, "silent": 0}
    assert all(row.vectors and row.is_coded for row in rows.values())


def test_evicted_checkpoints_are_counted_apart(fleet: Fleet) -> None:
    fleet.evict(["poems"], max_error=0.7, checkpoints_only=True)
    row = fleet.tasks()[0]
    assert (row.checkpoints, row.evicted_checkpoints, row.evicted_at) == (0, 2, None)


def test_only_tasks_of_one_base_model_can_be_listed(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="acme/elsewhere")])
    assert names(fleet) == sorted([*TASKS, "alien"])
    assert [row.name for row in fleet.tasks("acme/elsewhere")] == ["alien"]
    with pytest.raises(DataError, match="no task belongs to base model 'acme/nobody'"):
        fleet.tasks("acme/nobody")


def test_show_tells_what_was_trained_and_what_is_stored(fleet: Fleet, loras: Path) -> None:
    rules = fleet.show("rules")
    assert (rules.task.base_model, rules.task.final.rank_max) == (LABEL, 4)
    assert set(rules.task.final.target_modules) == {"q_proj", "k_proj", "down_proj"}
    assert rules.task.final.weights.size == (loras / "rules" / "adapter_model.safetensors").stat().st_size
    assert rules.generator is not None
    assert rules.task.code is not None
    assert rules.task.code.generator == rules.generator.blob


def test_a_name_is_found_in_any_case_and_told_as_it_is_stored(fleet: Fleet) -> None:
    assert fleet.show("RuLeS").task.name == "rules"


def test_a_damaged_code_does_not_keep_show_from_telling_the_rest(fleet: Fleet) -> None:
    code = fleet.show("rules").task.code
    assert code is not None
    damage(blob_of(fleet, code.blob))
    assert fleet.show("rules").task.code == code


@pytest.mark.parametrize("name", ["poem", "peoms", "Poems2"])
def test_a_near_miss_is_suggested(fleet: Fleet, name: str) -> None:
    for work in (fleet.show, lambda name: fleet.plan_removal([name]), lambda name: fleet.remove([name])):
        with pytest.raises(TaskNotFound) as error:
            work(name)
        assert (error.value.name, error.value.hint) == (name, "did you mean 'poems'?")


@pytest.mark.parametrize("name", ["", "../poems", "poems/..", "\x1b[31m", "a" * 5000])
def test_a_name_that_no_task_can_have_is_just_not_found(fleet: Fleet, name: str) -> None:
    with pytest.raises(TaskNotFound):
        fleet.show(name)


def test_reading_changes_no_byte(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    fleet.tasks()
    fleet.show("poems")
    fleet.plan_removal(TASKS)
    assert files_of(fleet.path) == before


def test_without_a_store_nothing_is_created(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "nowhere")
    edit, remove = lambda: fleet.edit(["x"], pinned=True), lambda: fleet.remove(["poems"])
    for work in (fleet.tasks, lambda: fleet.show("poems"), remove, edit):
        with pytest.raises(StoreNotFound) as error:
            work()
        assert "icm ingest" in str(error.value.hint)
    assert not fleet.path.exists()


@pytest.mark.slow
def test_a_plan_says_what_goes_and_what_would_be_lost(fleet: Fleet) -> None:
    fleet.evict(["silent"], max_error=0.7)
    poems, silent = fleet.plan_removal(["poems", "silent", "POEMS"])
    assert (poems.name, poems.adapters, poems.is_last_copy) == ("poems", 3, False)
    assert poems.size == sum(adapter.stored_bytes for adapter in fleet.show("poems").task.adapters)
    assert (silent.name, silent.is_last_copy) == ("silent", True)


def test_removed_bytes_are_freed_at_once(fleet: Fleet) -> None:
    weights = fleet.show("rules").task.final.weights
    report = fleet.remove(["RULES"])
    assert (report.tasks, (report.freed or 0) >= weights.size) == (["rules"], True)
    assert (names(fleet), has_blob(fleet, weights), is_sound(fleet)) == (["poems", "silent"], False, True)


def test_removed_bytes_stay_while_another_process_uses_the_store(fleet: Fleet) -> None:
    weights = fleet.show("rules").task.final.weights
    with fleet.context.open(read_only=True):
        assert Fleet(fleet.path, lock_timeout=0).remove(["rules"]).freed is None
    assert (names(fleet), has_blob(fleet, weights)) == (["poems", "silent"], True)
    fleet.prune(grace=0)
    assert (has_blob(fleet, weights), is_sound(fleet)) == (False, True)


def test_a_single_version_is_not_removed(fleet: Fleet) -> None:
    with pytest.raises(DataError, match="single version"):
        fleet.remove(["rules@1"])


def test_a_task_is_renamed_with_all_its_versions(fleet: Fleet, tmp_path: Path) -> None:
    before = fleet.load("rules", source="code")
    fleet.ingest([write_lora(tmp_path / "rules", seed=77)], on_conflict="version")
    fleet.edit(["rules"], name="laws", add_tags=["b", "A"])
    assert (names(fleet), fleet.show("laws").task.tags) == (["laws", "poems", "silent"], ("A", "b"))
    assert equal(fleet.load("laws@1", source="code"), before)
    fleet.edit(["laws"], name="Laws")
    assert equal(fleet.load("LAWS@1", source="code"), before)
    assert fleet.prune(grace=0).unlisted == ()
    fleet.rebuild_database()
    assert (names(fleet), is_sound(fleet)) == (["Laws", "poems", "silent"], True)
    assert equal(fleet.load("laws@1", source="code"), before)
    with pytest.raises(TaskConflict, match="already a task named 'poems'"):
        fleet.edit(["laws"], name="POEMS")


def test_edits_of_several_tasks_are_made_together(fleet: Fleet) -> None:
    with pytest.raises(TaskNotFound):
        fleet.edit(["rules", "nope"], note="x")
    assert fleet.show("rules").task.note is None
    with fleet.context.open(read_only=True) as store:
        before = store.changes()
        fleet.edit(["rules", "poems"], note="x", add_tags=["t"])
        fleet.edit(["rules", "RULES"], note="x")
        assert store.changes() == before + 1


def test_an_edit_that_loses_a_race_is_made_again(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    real, raced = Store.publish, list[str]()

    def publish(store: Store, *args: Any, **options: Any) -> Any:
        if not raced:
            raced.append("once")
            store.update("rules", lambda task: replace(task, note="theirs"))
        return real(store, *args, **options)

    monkeypatch.setattr(Store, "publish", publish)
    fleet.edit(["rules"], add_tags=["mine"])
    task = fleet.show("rules").task
    assert (task.tags, task.note) == (("mine",), "theirs")


def test_a_removed_task_can_be_ingested_again(fleet: Fleet, loras: Path) -> None:
    fleet.remove(["rules"])
    (task,) = fleet.ingest([loras / "rules"]).done
    assert (task.status, fleet.show("rules").task.code) == ("added", None)


def test_the_last_copy_is_removed_only_if_it_is_named_twice(fleet: Fleet) -> None:
    fleet.evict(["silent"], max_error=0.7)
    with pytest.raises(LastCopy, match="its code is the only copy"):
        fleet.remove(["poems", "silent"])
    assert names(fleet) == TASKS
    assert fleet.remove(["poems", "silent"], last_copies=["silent"]).tasks == ["poems", "silent"]


def test_weights_that_another_task_shares_survive_a_removal(fleet: Fleet, loras: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    fleet.remove(["silent"])
    fleet.prune(grace=0)
    assert fleet.load("twin").layout
    assert is_sound(fleet)
