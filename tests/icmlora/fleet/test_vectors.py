"""`Fleet.extract_vectors`: which tasks get vectors, which do not, and what a second or a stopped call does."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, DeviceUnavailable, Fleet, TaskNotFound
from icmlora.fleet.vectors.vectors import VectorReport, VectorsExtracted
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import files_of, is_sound, stop_after
from tests.icmlora.tiny_base import LABEL, write_tiny_base


@pytest.fixture
def bare(loras: Path, base_folder: Path, tmp_path: Path) -> Fleet:
    """The mixed fleet without vectors."""
    fleet = Fleet(tmp_path / "bare")
    fleet.add_base_model(LABEL, base_folder)
    fleet.ingest([loras], vectors=False)
    return fleet


def with_vectors(fleet: Fleet) -> list[str]:
    return [row.name for row in fleet.tasks() if row.vectors]


def test_the_report_counts_the_vectors_in_the_store(bare: Fleet) -> None:
    report = bare.extract_vectors(device="cpu")
    assert {task.task: task.vectors for task in report.done} == {row.name: row.vectors for row in bare.tasks()}
    assert {task.task: task.source for task in report.done} == {
        "poems": "samples", "rules": "samples", "silent": "probes",
    }  # fmt: skip


def test_a_task_without_samples_has_no_context_vectors(ingested: Fleet) -> None:
    views = {name: {vector.view for vector in ingested.show(name).task.vectors} for name in ("poems", "silent")}
    assert views == {"poems": {"adapted", "context"}, "silent": {"adapted"}}


def test_tasks_with_vectors_are_counted_and_left_alone(ingested: Fleet) -> None:
    before = files_of(ingested.path)
    report = ingested.extract_vectors(device="cpu")
    assert (report.done, report.present) == ([], 3)
    assert files_of(ingested.path) == before


def test_extracting_again_gives_the_same_vectors(ingested: Fleet) -> None:
    before = [vector.blob for vector in ingested.show("silent").task.vectors]
    report = ingested.extract_vectors(["silent"], device="cpu", again=True)
    assert (report.present, [task.task for task in report.done]) == (0, ["silent"])
    assert [vector.blob for vector in ingested.show("silent").task.vectors] == before


def test_only_the_named_tasks_get_vectors(bare: Fleet) -> None:
    bare.extract_vectors(["SILENT", "silent"], device="cpu")
    assert with_vectors(bare) == ["silent"]


def test_an_unknown_task_is_refused_before_any_work(bare: Fleet) -> None:
    with pytest.raises(TaskNotFound) as error:
        bare.extract_vectors(["silent", "poem"], device="cpu")
    assert (error.value.hint, with_vectors(bare)) == ("did you mean 'poems'?", [])


def test_an_evicted_original_has_nothing_to_run(fleet: Fleet, tmp_path: Path) -> None:
    file = fleet.export_bundle(tmp_path / "fleet.icm").file
    other = Fleet(tmp_path / "other")
    other.import_bundle(file)
    (skipped,) = other.extract_vectors(device="cpu", again=True).skipped
    assert (skipped.kind, skipped.tasks) == ("evicted", ["poems", "rules", "silent"])


def test_a_device_that_does_not_exist_is_refused_before_the_store_is_opened(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable) as error:
        Fleet(tmp_path / "nowhere").extract_vectors(device="abacus")
    assert error.value.hint == "choose auto, cpu, cuda, cuda:N or mps"


@pytest.mark.slow
def test_a_missing_base_model_is_named_and_the_others_are_done(bare: Fleet, tmp_path: Path) -> None:
    bare.ingest([write_lora(tmp_path / "more" / "alien", base_model_name_or_path="acme/elsewhere")])
    (left_out,) = bare.extract_vectors(device="cpu").skipped
    assert (left_out.base_model, list(left_out.tasks)) == ("acme/elsewhere", ["alien"])
    assert with_vectors(bare) == ["poems", "rules", "silent"]


def test_adapters_that_do_not_fit_their_base_model_are_named_with_the_reason(bare: Fleet, tmp_path: Path) -> None:
    bare.add_base_model(LABEL, write_tiny_base(tmp_path / "small", hidden=16))
    report = bare.extract_vectors(device="cpu")
    assert [failed.task for failed in report.failed] == ["poems", "rules", "silent"]
    assert {failed.kind for failed in report.failed} == {"base_model_mismatch"}
    assert with_vectors(bare) == []


def test_after_a_stop_only_the_rest_is_extracted(bare: Fleet) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(bare.path, on_event=stop_after(1, VectorsExtracted)).extract_vectors(device="cpu")
    assert isinstance(stopped.value.report, VectorReport)
    assert len(stopped.value.report.done) == 1
    assert is_sound(bare)
    report = bare.extract_vectors(device="cpu")
    assert (report.present, [task.task for task in report.done]) == (1, ["rules", "silent"])
