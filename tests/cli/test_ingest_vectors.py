"""`icm ingest` with the base model at hand: task vectors follow; without it they are pending."""

from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora import Cancelled, Fleet
from icmlora.fleet.ingest.report import IngestReport
from icmlora.fleet.vectors import vectors as extraction
from tests.cli.conftest import Ran
from tests.cli.fleet import write_texts
from tests.icmlora.fleet.stores import stop_after
from tests.icmlora.tiny_base import LABEL, write_tiny_adapter, write_tiny_base

Icm = Callable[..., Ran]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An adapter for the tiny base model, with samples."""
    folder = write_tiny_adapter(tmp_path / "loras" / "poems")
    write_texts(folder, count=16)
    return folder


def test_vectors_are_extracted_where_the_base_model_is_found(icm: Icm, run_folder: Path, tmp_path: Path) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "base"))
    ran = icm("ingest", run_folder, "--device", "cpu", "--json")
    assert [event["type"] for event in ran.events] == ["task", "vectors", "summary"]
    assert ran.events[-1]["without_vectors"] == []
    assert icm("ls", "--json").document[0]["vectors_count"] == ran.events[1]["vectors"] > 0


def test_the_library_leaves_the_same_store(icm: Icm, run_folder: Path, tmp_path: Path) -> None:
    base, fleet = write_tiny_base(tmp_path / "base"), Fleet(tmp_path / "other")
    icm("base", "add", LABEL, base)
    icm("ingest", run_folder, "--device", "cpu")
    fleet.add_base_model(LABEL, base)
    fleet.ingest([run_folder], device="cpu")
    blobs = [sorted(path.name for path in (tmp_path / name / "blobs").rglob("*")) for name in ("store", "other")]
    assert blobs[0] == blobs[1]
    shown = [icm("show", "poems", "--store", tmp_path / name, "--json").document for name in ("store", "other")]
    assert shown[0].keys() == shown[1].keys()
    assert shown[0]["vectors"] == shown[1]["vectors"] != []


def test_an_extraction_that_takes_long_says_how_long_and_may_be_stopped(
    icm: Icm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "_LONG", 0.0)
    base, told = write_tiny_base(tmp_path / "base"), stop_after(1, extraction.ExtractionTakesLong)
    for number in range(6):
        write_tiny_adapter(tmp_path / "loras" / f"poems-{number}")
    fleet = Fleet(tmp_path / "store", on_event=told)
    fleet.add_base_model(LABEL, base)
    with pytest.raises(Cancelled) as stopped:
        fleet.ingest([tmp_path / "loras"], device="cpu")
    report = stopped.value.report
    assert isinstance(report, IngestReport)
    assert (report.new, len(report.without_vectors)) == (6, 2)
    ran = icm("vectors", "--again", "--device", "cpu")
    assert "extracting the task vectors of 2 more tasks takes about 0 minutes" in ran.err


@pytest.mark.slow
def test_the_same_again_extracts_nothing(icm: Icm, run_folder: Path, tmp_path: Path) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "base"))
    icm("ingest", run_folder, "--device", "cpu")
    assert [event["type"] for event in icm("ingest", run_folder, "--json").events] == ["task", "summary"]


def test_without_the_base_model_the_vectors_are_pending(icm: Icm, run_folder: Path) -> None:
    ran = icm("ingest", run_folder)
    assert ran.code == 0
    assert "1 task without task vectors" in ran.err
    assert "icm vectors" in ran.err


def test_vectors_can_be_left_for_later(icm: Icm, run_folder: Path, tmp_path: Path) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "base"))
    assert icm("ingest", run_folder, "--no-vectors", "--json").events[-1]["without_vectors"] == ["poems"]


def test_an_adapter_that_does_not_fit_the_base_model_stays_without_vectors(
    icm: Icm, run_folder: Path, tmp_path: Path
) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "base", hidden=64))
    ran = icm("ingest", run_folder, "--device", "cpu")
    assert ran.code == ExitCode.PARTLY
    assert "q_proj" in ran.err
    assert icm("ls", "-q").out == "poems\n"


def test_a_device_that_is_not_there_is_an_error_with_a_hint(icm: Icm, run_folder: Path, tmp_path: Path) -> None:
    icm("base", "add", LABEL, write_tiny_base(tmp_path / "base"))
    ran = icm("ingest", run_folder, "--device", "tpu")
    assert ran.code == 1
    assert "hint: choose auto" in ran.err
