"""`Fleet.ingest`: what it reports, what it refuses, and what a second or a stopped call does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from icmlora import AdapterRefused, Cancelled, Event, Fleet, Progress, TaskConflict, UnsafeInput, load_adapter
from icmlora.fleet.ingest.report import IngestReport, InputProblem, TaskIngested
from icmlora.fleet.vectors.vectors import VectorsExtracted
from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, blob_of, damage, equal, files_of, is_sound, size_of, stop_after
from tests.icmlora.tiny_base import write_tiny_base


@pytest.fixture
def new(tmp_path: Path) -> Fleet:
    """A fleet without a store."""
    return Fleet(tmp_path / "new")


def adapter_bytes(folder: Path) -> int:
    """Return the bytes of the adapters in a folder: their weights, configurations and cards, but no texts."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl")


def test_the_reported_sizes_are_those_of_the_files(new: Fleet, loras: Path) -> None:
    report = new.ingest([loras])
    assert {task.task: task.size for task in report.done} == {name: adapter_bytes(loras / name) for name in TASKS}
    assert report.size == adapter_bytes(loras)


def test_the_stored_weights_are_the_given_bytes(new: Fleet, loras: Path) -> None:
    new.ingest([loras])
    given = (loras / "rules" / "adapter_model.safetensors").read_bytes()
    assert blob_of(new, new.show("rules").task.final.weights).read_bytes() == given


def test_ingesting_the_same_again_changes_no_byte(ingested: Fleet, loras: Path) -> None:
    before = files_of(ingested.path)
    report = ingested.ingest([loras])
    assert (report.new, report.known, {task.status for task in report.done}) == (0, 5, {"known"})
    assert files_of(ingested.path) == before


def test_a_folder_that_is_given_twice_is_ingested_once(new: Fleet, loras: Path) -> None:
    report = new.ingest([loras, loras / "poems", str(loras / "poems")])
    assert (report.found, report.new) == (3, 5)


def test_each_task_is_told_when_it_is_in_the_store(loras: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    report = Fleet(tmp_path / "new", on_event=heard.append).ingest([loras])
    assert [event for event in heard if isinstance(event, TaskIngested)] == report.done
    steps = [event for event in heard if isinstance(event, Progress)]
    assert (steps[0], steps[-1].done, steps[-1].total) == (Progress(0, 5), 5, 5)


def test_only_tasks_whose_base_model_is_here_can_get_vectors(new: Fleet, loras: Path, base_folder: Path) -> None:
    report = new.ingest([loras])
    assert (report.without_vectors, report.vectors) == (TASKS, None)
    new.add_base_model("tiny/llama", base_folder)
    extracted = (again := new.ingest([loras])).vectors
    assert extracted is not None
    assert ([task.task for task in extracted.done], again.without_vectors) == (TASKS, [])


def test_vectors_are_extracted_only_if_they_are_wanted(new: Fleet, loras: Path, base_folder: Path) -> None:
    new.ingest([loras])
    new.add_base_model("tiny/llama", base_folder)
    report = new.ingest([loras], vectors=False)
    assert (report.without_vectors, report.vectors) == (TASKS, None)


def test_a_stopped_extraction_reports_what_was_ingested_and_extracted(
    loras: Path, base_folder: Path, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, VectorsExtracted):
            raise Cancelled

    fleet = Fleet(tmp_path / "new", on_event=stop)
    fleet.ingest([loras], vectors=False)
    fleet.add_base_model("tiny/llama", base_folder)
    with pytest.raises(Cancelled) as stopped:
        fleet.ingest([loras])
    report = stopped.value.report
    assert isinstance(report, IngestReport)
    assert report.vectors is not None
    assert ([task.task for task in report.vectors.done], len(report.done)) == (TASKS[:1], 3)
    assert report.without_vectors == TASKS[1:]


def test_an_adapter_whose_vectors_cannot_be_extracted_is_ingested(new: Fleet, tmp_path: Path) -> None:
    new.ingest([write_lora(tmp_path / "poems")])
    new.add_base_model("tiny/llama", write_tiny_base(tmp_path / "base", hidden=64))
    report = new.ingest([tmp_path / "poems"])
    assert report.vectors is not None
    assert [(failed.task, failed.kind) for failed in report.vectors.failed] == [("poems", "vectors")]
    assert report.without_vectors == [row.name for row in new.tasks()] == ["poems"]


def test_a_new_checkpoint_is_added_to_its_task(ingested: Fleet, loras: Path, tmp_path: Path) -> None:
    poems = Path(shutil.copytree(loras / "poems", tmp_path / "poems"))
    write_lora(poems / "checkpoint-15", seed=15)
    (task,) = ingested.ingest([poems]).done
    assert (task.status, task.new, task.known) == ("updated", 1, 3)
    assert [adapter.step for adapter in ingested.show("poems").task.adapters] == [10, 15, 20, None]


def test_texts_can_be_left_out(new: Fleet, loras: Path) -> None:
    new.ingest([loras / "poems"], texts=False)
    task = new.show("poems").task
    assert (task.samples, task.eval_data) == (None, None)


def test_samples_can_come_from_another_file(new: Fleet, loras: Path, tmp_path: Path) -> None:
    samples = write_texts(tmp_path, "others.jsonl", count=3)
    new.ingest([loras / "poems"], samples=samples)
    digest = new.show("poems").task.samples
    assert digest is not None
    assert blob_of(new, digest).read_bytes() == samples.read_bytes()


def test_a_name_replaces_that_of_the_folder(new: Fleet, loras: Path) -> None:
    assert [task.task for task in new.ingest([loras / "rules"], name="Laws-2").done] == ["Laws-2"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"name": "x"}, "name"), ({"samples": "samples.jsonl"}, "samples")],
)
def test_what_is_for_one_task_is_refused_for_several(
    new: Fleet, loras: Path, options: dict[str, str], kind: str
) -> None:
    with pytest.raises(AdapterRefused, match="3 were found") as refused:
        new.ingest([loras], **options)  # type: ignore[arg-type]
    assert (refused.value.kind, new.path.exists()) == (kind, False)


@pytest.mark.parametrize("name", ["../poems", "", "a b", "-x", "a" * 300])
def test_a_name_that_no_task_can_have_is_refused(new: Fleet, loras: Path, name: str) -> None:
    with pytest.raises(AdapterRefused, match="is not a valid task name"):
        new.ingest([loras / "poems"], name=name)


def test_no_path_at_all_is_refused(new: Fleet) -> None:
    with pytest.raises(AdapterRefused, match=r"^no adapter was found$") as refused:
        new.ingest([])
    assert refused.value.kind == "nothing-found"


def test_a_path_that_does_not_exist_is_named(new: Fleet, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match="does not exist") as refused:
        new.ingest([tmp_path / "nowhere"])
    assert refused.value.path == str(tmp_path / "nowhere")


def test_a_refused_adapter_is_passed_over_with_its_reason(loras: Path, tmp_path: Path) -> None:
    bad = write_lora(tmp_path / "bad" / "cut")
    (bad / "adapter_config.json").write_text("{")
    heard: list[Event] = []
    report = Fleet(tmp_path / "new", on_event=heard.append).ingest([bad, loras / "rules"])
    assert [task.task for task in report.done] == ["rules"]
    (refused,) = report.problems
    assert (refused.kind, refused.path, refused.task) == ("json", str(bad / "adapter_config.json"), None)
    assert [event for event in heard if isinstance(event, InputProblem)] == [refused]


def test_strict_stores_nothing_where_one_adapter_is_bad(new: Fleet, loras: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loras, tmp_path / "loras"))
    (write_lora(folder / "cut") / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterRefused):
        new.ingest([folder], strict=True)
    assert not new.path.exists()


def test_a_pickle_is_unsafe_input(new: Fleet, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "old")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsafeInput) as refused:
        new.ingest([folder])
    assert refused.value.kind == "pickle"


def test_if_everything_is_refused_the_first_reason_is_raised(new: Fleet, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (write_lora(tmp_path / "bad" / name) / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterRefused, match="all 2 inputs were refused") as refused:
        new.ingest([tmp_path / "bad"])
    assert refused.value.kind == "json"


def test_a_changed_adapter_in_the_same_folder_is_the_next_version(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "odes", seed=98)])
    first = fleet.show("odes").task
    (task,) = fleet.ingest([write_lora(tmp_path / "odes", seed=99)]).done
    assert (task.status, task.version, task.new) == ("version", 2, 1)
    with fleet.context.open(read_only=True) as store:
        assert [one.final.weights for one in store.history("odes")] == [
            first.final.weights,
            store.task("odes").final.weights,
        ]


def test_a_changed_adapter_can_be_refused(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "odes", seed=98)])
    before = files_of(fleet.path)["registry.db"]
    with pytest.raises(TaskConflict) as conflict:
        fleet.ingest([write_lora(tmp_path / "odes", seed=99)], on_conflict="fail")
    assert "choose another name" in str(conflict.value.hint)
    assert files_of(fleet.path)["registry.db"] == before


def test_another_folder_of_the_same_name_is_another_task(fleet: Fleet, tmp_path: Path) -> None:
    (task,) = fleet.ingest([write_lora(tmp_path / "other" / "poems", seed=99)]).done
    assert (task.task, task.status, task.is_renamed) == ("other-poems", "added", True)


def test_a_conflict_can_leave_the_task_as_it_is(fleet: Fleet, tmp_path: Path) -> None:
    before = fleet.show("poems")
    other = write_lora(tmp_path / "other" / "poems", seed=99)
    (task,) = fleet.ingest([other], on_conflict="skip").done
    assert (task.status, task.new) == ("skipped", 0)
    assert fleet.show("poems") == before


def test_a_new_version_has_no_code_and_no_vectors_and_the_old_one_keeps_them(fleet: Fleet, tmp_path: Path) -> None:
    first = fleet.show("poems").task
    other = write_lora(tmp_path / "other" / "poems", seed=99)
    (ingested,) = fleet.ingest([other], on_conflict="version", vectors=False).done
    task = fleet.show("poems").task
    assert (ingested.status, task.version, task.code, task.vectors) == ("version", 2, None, ())
    assert equal(fleet.load("poems"), load_adapter(other))
    with fleet.context.open(read_only=True) as store:
        assert store.task("poems@1") == first


def test_a_dry_run_of_a_version_changes_no_byte(fleet: Fleet, tmp_path: Path) -> None:
    before = files_of(fleet.path)
    write_lora(tmp_path / "others" / "poems", seed=99)
    write_lora(tmp_path / "others" / "odes", seed=98)
    report = fleet.ingest([tmp_path / "others"], on_conflict="version", dry_run=True)
    assert {task.task: task.status for task in report.done} == {"odes": "added", "poems": "version"}
    assert files_of(fleet.path) == before


def test_evicted_originals_stay_evicted_until_they_are_restored(fleet: Fleet, loras: Path) -> None:
    fleet.evict(["poems"], max_error=0.7)
    assert (report := fleet.ingest([loras / "poems"])).evicted == 3
    assert (report.restored, fleet.show("poems").task.final.is_evicted) == (0, True)
    assert (report := fleet.ingest([loras / "poems"], restore=True)).restored == 3
    assert (report.evicted, equal(fleet.load("poems"), load_adapter(loras / "poems"))) == (0, True)


def test_a_task_with_a_damaged_manifest_is_refused_and_the_rest_is_ingested(
    ingested: Fleet, loras: Path, tmp_path: Path
) -> None:
    manifest = ingested.show("poems").task.manifest
    (path,) = (ingested.path / "manifests").rglob(str(manifest))
    damage(path)
    write_lora(loras_with_odes := Path(shutil.copytree(loras, tmp_path / "more")) / "odes", seed=98)
    report = ingested.ingest([loras, loras_with_odes])
    assert sorted(task.task for task in report.done) == ["odes", "rules", "silent"]
    (problem,) = report.problems
    assert (problem.kind, "is damaged" in problem.message) == ("unreadable", True)


def test_a_stopped_ingest_reports_what_it_told_and_the_next_call_finishes(loras: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(tmp_path / "new", on_event=stop_after(1, TaskIngested)).ingest([loras])
    report = stopped.value.report
    assert isinstance(report, IngestReport)
    assert ([task.task for task in report.done], report.without_vectors) == (["poems"], ["poems"])
    fleet = Fleet(tmp_path / "new")
    assert is_sound(fleet)
    again = fleet.ingest([loras])
    assert (again.new + again.known, [row.name for row in fleet.tasks()]) == (5, TASKS)


def test_an_ingest_that_is_stopped_at_once_leaves_an_empty_store(loras: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        Fleet(tmp_path / "new", on_event=stop_after(1)).ingest([loras])
    assert Fleet(tmp_path / "new").tasks() == []


@pytest.mark.one_case
@pytest.mark.parametrize("name", ["two words", "größe ✓ 倉庫", "what?#frag%20&mode=ro", 'it\'s "quoted"'])
def test_a_store_may_have_any_path(loras: Path, tmp_path: Path, name: str) -> None:
    fleet = Fleet(str(tmp_path / name / "store"))
    fleet.ingest([loras / "silent"])
    assert fleet.path == tmp_path / name / "store"
    assert equal(fleet.load("silent"), load_adapter(loras / "silent"))
    assert fleet.stats().usage.total == size_of(fleet.path)
    assert is_sound(fleet)
