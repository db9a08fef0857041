"""`Fleet` and `Bundle` from Python: adapters in, adapters out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from icmlora import Adapter, Bundle, Cancelled, Event, Fleet, Progress, load_adapter
from icmlora.errors import BundleError, DataError
from icmlora.fleet.vectors.vectors import VectorReport, VectorsExtracted
from icmlora.fleet.write.sources import TooLossy
from tests.cli.conftest import Ran, imported_by
from tests.icmlora.tiny_base import LABEL

TASKS = ("poems", "rules", "silent")


def equal(one: Adapter, other: Adapter) -> bool:
    pairs = list(zip(one.modules, other.modules, strict=True))
    return all(x.name == y.name and torch.equal(x.a, y.a) and torch.equal(x.b, y.b) for x, y in pairs)


@pytest.fixture
def bundle(trained: Path, tmp_path: Path) -> Path:
    """A bundle of all three tasks."""
    return Fleet(trained).export_bundle(tmp_path / "fleet.icm").file


def test_a_store_is_filled_and_gives_its_adapters_back(tmp_path: Path, mixed_template: Path) -> None:
    heard: list[Event] = []
    fleet = Fleet(tmp_path / "new", on_event=heard.append)
    report = fleet.ingest([mixed_template / "loras"])
    assert ([task.task for task in report.done], report.new, report.vectors) == (list(TASKS), 5, None)
    done = fleet.materialize("poems", tmp_path / "out")
    assert (done.source, done.squared_error) == ("original", 0.0)
    assert equal(fleet.load("poems"), load_adapter(mixed_template / "loras" / "poems"))
    assert any(isinstance(event, Progress) for event in heard)


def test_a_dry_run_reports_what_would_be_ingested_and_makes_no_store(tmp_path: Path, mixed_template: Path) -> None:
    report = Fleet(tmp_path / "new").ingest([mixed_template / "loras"], dry_run=True)
    assert (report.found, report.new, (tmp_path / "new").exists()) == (3, 5, False)


def test_vectors_that_were_extracted_before_a_stop_stay(mixed: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, VectorsExtracted):
            raise Cancelled

    with pytest.raises(Cancelled) as stopped:
        Fleet(mixed, on_event=stop).extract_vectors(device="cpu", again=True)
    report = stopped.value.report
    assert isinstance(report, VectorReport)
    assert [task.task for task in report.done] == ["poems"]


@pytest.mark.parametrize("source", ["original", "code", "recalled"])
def test_an_adapter_in_memory_is_the_one_in_the_folder(trained: Path, tmp_path: Path, source: str) -> None:
    fleet = Fleet(trained)
    fleet.materialize("silent", tmp_path / "out", source=source, dtype="float32")  # type: ignore[arg-type]
    written = load_adapter(tmp_path / "out")
    loaded = fleet.load("silent", source=source)  # type: ignore[arg-type]
    for one, other in zip(loaded.modules, written.modules, strict=True):  # a folder pads the rank with zeros
        torch.testing.assert_close(one.b @ one.a, other.b @ other.a, rtol=1e-6, atol=1e-7)


def test_loading_an_adapter_honours_the_limit_on_its_error(trained: Path) -> None:
    with pytest.raises(TooLossy, match="the limit is"):
        Fleet(trained).load("poems", source="code", max_error=0.01)


def test_a_bundle_tells_what_is_in_it(bundle: Path) -> None:
    opened = Bundle(bundle)
    assert [task.name for task in opened.tasks] == list(TASKS)
    assert (opened.base_model, opened.generator.version) == (LABEL, 1)
    assert opened.size == bundle.stat().st_size
    assert all(task.code is not None and 0 < task.code.size < task.final.original_bytes for task in opened.tasks)


def test_a_bundle_loads_the_adapter_that_the_store_loads(bundle: Path, trained: Path) -> None:
    expected = Fleet(trained).load("rules", source="code")
    shutil.rmtree(trained)
    assert equal(Bundle(bundle).load("RULES"), expected)


def test_a_bundle_has_no_other_tasks(bundle: Path) -> None:
    with pytest.raises(DataError, match="has no task named 'poem'") as error:
        Bundle(bundle).load("poem")
    assert error.value.hint == "did you mean 'poems'?"


def test_a_bundle_that_was_replaced_since_it_was_opened_is_refused(bundle: Path, trained: Path) -> None:
    opened = Bundle(bundle)
    Fleet(trained).export_bundle(bundle, ["poems"], force=True)
    with pytest.raises(BundleError, match="replaced"):
        opened.load("poems")


def test_an_export_that_is_stopped_writes_no_file(trained: Path, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        Fleet(trained, on_event=stop).export_bundle(tmp_path / "out.icm")
    assert not (tmp_path / "out.icm").exists()


def test_an_import_that_is_stopped_records_nothing(bundle: Path, tmp_path: Path, icm: Callable[..., Ran]) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            raise Cancelled

    with pytest.raises(Cancelled):
        Fleet(tmp_path / "other", on_event=stop).import_bundle(bundle)
    assert icm("--store", tmp_path / "other", "ls", "-q").out == ""
    report = Fleet(tmp_path / "other").import_bundle(bundle, ["poems"])
    assert report.tasks == {"poems": "added"}


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.partition(".")[0] in ("icm_cli", "icmlora", "registry")}


@pytest.mark.parametrize(("source", "most"), [("original", 100), ("code", 135)])
def test_writing_an_adapter_imports_few_of_our_modules(trained: Path, tmp_path: Path, source: str, most: int) -> None:
    modules = imported_by("materialize", "poems", "--source", source, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out").is_dir()
    assert len(ours(modules)) <= most, sorted(ours(modules))


@pytest.mark.slow
def test_ingest_without_the_base_model_imports_no_torch(tmp_path: Path, mixed_template: Path) -> None:
    modules = imported_by("ingest", str(mixed_template / "loras"))
    assert not {"torch", "transformers", "peft"} & modules
