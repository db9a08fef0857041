"""`Fleet.tasks`, `show`, `plan_removal` and `remove`."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import DataError, Fleet, LastCopy, StoreNotFound, TaskNotFound
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, damage, files_of, has_blob, is_sound
from tests.icmlora.tiny_base import LABEL


def names(fleet: Fleet) -> list[str]:
    return [row.task.name for row in fleet.tasks()]


def test_a_listing_says_what_each_task_has(fleet: Fleet) -> None:
    rows = {row.task.name: row for row in fleet.tasks()}
    assert {name: rows[name].checkpoints for name in TASKS} == {"poems": 2, "rules": 0, "silent": 0}
    assert all(row.vectors and row.code is not None for row in rows.values())


def test_evicted_checkpoints_are_counted_apart(fleet: Fleet) -> None:
    fleet.evict(["poems"], max_error=0.7, checkpoints_only=True)
    row = fleet.tasks()[0]
    assert (row.checkpoints, row.evicted_checkpoints, row.final.is_evicted) == (0, 2, False)


def test_only_tasks_of_one_base_model_can_be_listed(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="acme/elsewhere")])
    assert names(fleet) == sorted([*TASKS, "alien"])
    assert [row.task.name for row in fleet.tasks("acme/elsewhere")] == ["alien"]
    with pytest.raises(DataError, match="no task belongs to base model 'acme/nobody'"):
        fleet.tasks("acme/nobody")


def test_show_tells_what_was_trained_and_what_is_stored(fleet: Fleet, loras: Path) -> None:
    rules = fleet.show("rules")
    assert (rules.task.base_model, rules.final.rank_max) == (LABEL, 4)
    assert set(rules.final.target_modules) == {"q_proj", "k_proj", "down_proj"}
    assert rules.final.weights_bytes == (loras / "rules" / "adapter_model.safetensors").stat().st_size
    assert rules.generator is not None
    assert rules.code is not None
    assert rules.code.generator_id == rules.generator.id


def test_a_name_is_found_in_any_case_and_told_as_it_is_stored(fleet: Fleet) -> None:
    assert fleet.show("RuLeS").task.name == "rules"


def test_a_damaged_code_does_not_keep_show_from_telling_the_rest(fleet: Fleet) -> None:
    code = fleet.show("rules").code
    assert code is not None
    damage(blob_of(fleet, code.blob))
    assert fleet.show("rules").code == code


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
    assert poems.size == sum(adapter.stored_bytes for adapter in fleet.show("poems").adapters)
    assert (silent.name, silent.is_last_copy) == ("silent", True)


def test_removed_bytes_stay_until_they_are_pruned(fleet: Fleet) -> None:
    weights = fleet.show("rules").final.weights
    assert fleet.remove(["RULES"]) == ["rules"]
    assert (names(fleet), has_blob(fleet, weights)) == (["poems", "silent"], True)
    fleet.prune(grace=0)
    assert (has_blob(fleet, weights), is_sound(fleet)) == (False, True)


def test_a_removed_task_can_be_ingested_again(fleet: Fleet, loras: Path) -> None:
    fleet.remove(["rules"])
    (task,) = fleet.ingest([loras / "rules"]).ingested
    assert (task.status, fleet.show("rules").code) == ("added", None)


def test_the_last_copy_is_removed_only_if_it_is_named_twice(fleet: Fleet) -> None:
    fleet.evict(["silent"], max_error=0.7)
    with pytest.raises(LastCopy, match="its code is the only copy"):
        fleet.remove(["poems", "silent"])
    assert names(fleet) == TASKS
    assert fleet.remove(["poems", "silent"], last_copies=["silent"]) == ["poems", "silent"]


def test_weights_that_another_task_shares_survive_a_removal(fleet: Fleet, loras: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    fleet.remove(["silent"])
    fleet.prune(grace=0)
    assert fleet.load("twin").layout
    assert is_sound(fleet)
