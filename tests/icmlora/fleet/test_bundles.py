"""`Fleet.export_bundle`, `Fleet.import_bundle` and `Bundle`: codes that travel without a store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from icmlora import (
    Bundle,
    BundleError,
    Cancelled,
    DataError,
    Fleet,
    OutputExists,
    TaskConflict,
    TaskNotFound,
    UnsafeInput,
    load_adapter,
)
from icmlora.fleet.resources.code_source import CodeSource, open_codes
from icmlora.fleet.write.sources import TooLossy, resolve_source
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, damage, equal, files_of, is_sound, stop_after
from tests.icmlora.tiny_base import LABEL


@pytest.fixture
def file(fleet: Fleet, tmp_path: Path) -> Path:
    """A bundle of all three tasks."""
    return fleet.export_bundle(tmp_path / "fleet.icm").file


@pytest.fixture
def other(tmp_path: Path) -> Fleet:
    """A fleet without a store."""
    return Fleet(tmp_path / "other")


def names(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks()]


# export


def test_the_report_says_what_is_in_the_file(fleet: Fleet, tmp_path: Path) -> None:
    report = fleet.export_bundle(str(tmp_path / "out.icm"))
    opened = Bundle(report.file)
    assert (report.size, report.digest, report.index) == (opened.size, opened.digest, opened.index)
    assert report.size == (tmp_path / "out.icm").stat().st_size
    assert report.left_out == ()


def test_sizes_in_a_bundle_are_those_of_the_store(fleet: Fleet, file: Path) -> None:
    opened = Bundle(str(file))
    for task in opened.tasks:
        assert task.code is not None
        assert task.code.size == blob_of(fleet, code_blobs(fleet)[task.name]).stat().st_size
        assert task.final.original_bytes == fleet.show(task.name).task.final.original_bytes


def test_the_same_store_gives_the_same_file(fleet: Fleet, file: Path, tmp_path: Path) -> None:
    assert fleet.export_bundle(tmp_path / "again.icm").file.read_bytes() == file.read_bytes()


def test_exporting_changes_no_byte_of_the_store(fleet: Fleet, tmp_path: Path) -> None:
    before = files_of(fleet.path)
    fleet.export_bundle(tmp_path / "out.icm")
    assert files_of(fleet.path) == before


def test_only_named_tasks_are_exported_each_once(fleet: Fleet, tmp_path: Path) -> None:
    report = fleet.export_bundle(tmp_path / "out.icm", ["silent", "POEMS", "poems"])
    assert [task.name for task in report.index.tasks] == ["poems", "silent"]


def test_tasks_without_a_code_are_left_out_unless_they_are_named(fleet: Fleet, loras: Path, tmp_path: Path) -> None:
    fleet.ingest([loras / "silent"], name="twin")
    assert fleet.export_bundle(tmp_path / "out.icm").left_out == ("twin",)
    with pytest.raises(DataError, match="no code: twin"):
        fleet.export_bundle(tmp_path / "twin.icm", ["twin", "poems"])
    assert not (tmp_path / "twin.icm").exists()


@pytest.mark.slow
def test_two_base_models_need_a_choice(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="acme/elsewhere")])
    fleet.train(device="cpu", base_model="acme/elsewhere", steps=2, refine=0, evaluate=False)
    with pytest.raises(DataError, match="these tasks have 2: acme/elsewhere, tiny/llama"):
        fleet.export_bundle(tmp_path / "out.icm")
    report = fleet.export_bundle(tmp_path / "out.icm", base_model="acme/elsewhere")
    assert [task.name for task in report.index.tasks] == ["alien"]


def test_before_a_training_there_is_nothing_to_export(ingested: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task has a code to export") as error:
        ingested.export_bundle(tmp_path / "out.icm")
    assert error.value.hint == "run `icm train` to make codes"


def test_an_unknown_task_is_refused_with_the_closest_name(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(TaskNotFound) as error:
        fleet.export_bundle(tmp_path / "out.icm", ["poem"])
    assert error.value.hint == "did you mean 'poems'?"


def test_a_file_that_exists_stays_without_force(fleet: Fleet, file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(OutputExists):
        fleet.export_bundle(file, ["poems"])
    assert file.read_bytes() == before
    assert fleet.export_bundle(file, ["poems"], force=True).size < len(before)


def test_a_damaged_code_is_not_exported(fleet: Fleet, tmp_path: Path) -> None:
    damage(blob_of(fleet, code_blobs(fleet)["rules"]))
    report = fleet.export_bundle(tmp_path / "out" / "fleet.icm")
    assert "rules" not in [task.name for task in report.index.tasks]
    assert list(report.damaged) == ["rules"]


def test_a_stopped_export_leaves_no_file(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        Fleet(fleet.path, on_event=stop_after(2)).export_bundle(tmp_path / "out.icm")
    assert list(tmp_path.glob("*.icm*")) == []


# open


def test_a_bundle_needs_no_store(fleet: Fleet, file: Path, tmp_path: Path) -> None:
    expected = {name: fleet.load(name, source="code") for name in TASKS}
    fleet.materialize("poems", tmp_path / "stored", source="code")
    shutil.rmtree(fleet.path)
    opened = Bundle(file)
    assert all(equal(opened.load(name), expected[name]) for name in TASKS)
    report = opened.materialize("Poems", tmp_path / "bundled")
    assert (report.task, report.source) == ("poems", "code")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "bundled" / weights).read_bytes() == (tmp_path / "stored" / weights).read_bytes()


def test_a_limit_on_the_error_is_kept(file: Path, tmp_path: Path) -> None:
    opened = Bundle(file)
    with pytest.raises(TooLossy):
        opened.materialize("poems", tmp_path / "out", max_error=0.032)
    assert not (tmp_path / "out").exists()
    done = opened.materialize("poems", tmp_path / "out", max_error=0.95)
    assert done.claim is not None
    code = opened.tasks[0].code
    assert code is not None
    assert (done.squared_error, done.claim) == (None, code.claim)


def test_a_folder_that_is_not_empty_stays(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        Bundle(file).materialize("poems", tmp_path / "out")
    assert files_of(tmp_path / "out") == {"mine": b"mine"}


def test_an_unknown_number_format_writes_nothing(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown number format 'int4'"):
        Bundle(file).materialize("poems", tmp_path / "out", dtype="int4")
    assert not (tmp_path / "out").exists()


def test_a_name_far_from_all_others_gets_no_guess(file: Path) -> None:
    with pytest.raises(DataError, match="has no task named 'zzz'") as error:
        Bundle(file).load("zzz")
    assert error.value.hint == "run `icm ls --from FILE` to list its tasks"


@pytest.mark.parametrize(("content", "fact"), [(b"", "bundle"), (b"just text", "not an icm bundle")])
def test_another_file_is_not_a_bundle(tmp_path: Path, content: bytes, fact: str) -> None:
    (tmp_path / "file.icm").write_bytes(content)
    with pytest.raises(BundleError, match=fact):
        Bundle(tmp_path / "file.icm")


def test_a_bundle_that_is_cut_short_is_refused_when_it_is_opened(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError):
        Bundle(file)


def test_damage_is_noticed_before_an_adapter_is_decoded(file: Path, tmp_path: Path) -> None:
    damage(file)
    with pytest.raises(BundleError):
        Bundle(file).materialize("poems", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_unsafe_input(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInput, match="not a regular file"):
        Bundle(tmp_path)


# import


def test_an_imported_task_is_an_evicted_one_with_the_same_code(fleet: Fleet, file: Path, other: Fleet) -> None:
    report = other.import_bundle(file)
    assert report.tasks == dict.fromkeys(TASKS, "added")
    assert code_blobs(other) == code_blobs(fleet)
    assert all(row.evicted_at is not None for row in other.tasks())
    assert is_sound(other)


def test_an_imported_task_is_materialized_from_its_code(fleet: Fleet, file: Path, other: Fleet, tmp_path: Path) -> None:
    other.import_bundle(str(file))
    assert other.materialize("rules", tmp_path / "out").source == "code"
    assert equal(other.load("rules"), fleet.load("rules", source="code"))
    with pytest.raises(DataError, match="was never in this store"):
        other.load("rules", source="original")


def test_importing_again_changes_no_byte(file: Path, other: Fleet) -> None:
    other.import_bundle(file)
    before = files_of(other.path)
    assert set(other.import_bundle(file).tasks.values()) == {"known"}
    assert files_of(other.path) == before


def test_only_named_tasks_are_imported(file: Path, other: Fleet) -> None:
    assert list(other.import_bundle(file, ["SILENT"]).tasks) == ["silent"]
    assert names(other) == ["silent"]
    with pytest.raises(DataError, match="has no task named 'poem'"):
        other.import_bundle(file, ["poem"])


def test_a_dry_run_makes_no_store_and_changes_none(file: Path, other: Fleet) -> None:
    assert set(other.import_bundle(file, dry_run=True).tasks.values()) == {"added"}
    assert not other.path.exists()
    other.import_bundle(file, ["silent"])
    before = files_of(other.path)
    planned = other.import_bundle(file, dry_run=True).tasks
    assert list(planned.values()) == ["added", "added", "known"]
    assert files_of(other.path) == before


def test_an_original_that_is_imported_later_can_be_restored(file: Path, other: Fleet, loras: Path) -> None:
    other.import_bundle(file)
    assert other.ingest([loras / "rules"], restore=True).restored == 1
    assert equal(other.load("rules"), load_adapter(loras / "rules"))


def test_a_task_that_is_there_gets_its_code(file: Path, other: Fleet, loras: Path) -> None:
    other.ingest([loras])
    assert set(other.import_bundle(file).tasks.values()) == {"encoded"}
    assert not any(row.evicted_at is not None for row in other.tasks())


@pytest.mark.slow
def test_another_adapter_of_the_same_name_is_a_conflict(file: Path, other: Fleet, tmp_path: Path) -> None:
    other.ingest([write_lora(tmp_path / "mine" / "poems", seed=99)])
    with pytest.raises(TaskConflict, match="'poems'"):
        other.import_bundle(file)
    assert names(other) == ["poems"]
    report = other.import_bundle(file, on_conflict="skip")
    assert list(report.tasks.values()) == ["skipped", "added", "added"]
    assert not other.show("poems").task.final.is_evicted


def test_a_task_with_another_code_keeps_it(file: Path, fleet: Fleet) -> None:
    fleet.train(device="cpu", steps=2, fresh=True, seed=5, refine=0, evaluate=False)
    before = code_blobs(fleet)
    with pytest.raises(TaskConflict):
        fleet.import_bundle(file)
    assert set(fleet.import_bundle(file, on_conflict="skip").tasks.values()) == {"skipped"}
    assert code_blobs(fleet) == before


def test_a_stopped_import_records_nothing_and_the_next_one_finishes(file: Path, other: Fleet) -> None:
    with pytest.raises(Cancelled):
        Fleet(other.path, on_event=stop_after(2)).import_bundle(file)
    assert (names(other), is_sound(other)) == ([], True)
    other.import_bundle(file)
    assert names(other) == TASKS


def test_what_was_measured_elsewhere_travels_along_as_a_claim(learned: Fleet, other: Fleet, tmp_path: Path) -> None:
    learned.evaluate(["apples"], sources=["code"], device="cpu")
    gain = learned.stats().fleets[0].tasks[0].row.gain
    other.import_bundle(learned.export_bundle(tmp_path / "out.icm").file)
    (fleet,) = other.stats().fleets
    assert (fleet.base_model, fleet.tasks[0].row.gain, fleet.tasks[0].row.claim is None) == (LABEL, None, False)
    code = other.show("apples").task.code
    assert code is not None
    assert code.claim is not None
    assert code.claim.retained_gain == gain


def test_a_bundle_answers_with_the_tasks_of_a_store_that_imported_it(file: Path, other: Fleet) -> None:
    other.import_bundle(file)
    with open_codes(Bundle(file).context) as bundled, open_codes(other.context) as stored:
        sources: tuple[CodeSource, CodeSource] = (bundled, stored)
        assert bundled.names() == stored.names() == list(TASKS)
        for name in TASKS:
            one, two = (codes.get(name) for codes in sources)
            moments = {"created_at": "", "evicted_at": ""}
            assert replace(one.final, **moments) == replace(two.final, **moments)
            assert (one.base_model, one.code) == (two.base_model, two.code)
            made = [resolve_source(codes, codes.get(name)) for codes in sources]
            assert (made[0].source, made[0].code) == (made[1].source, made[1].code)
