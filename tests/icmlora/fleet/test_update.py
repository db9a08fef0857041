"""`Fleet.update`: codes for new tasks, while earlier codes and evicted originals stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, DataError, Event, Fleet, Progress
from icmlora.fleet.train.report import CodeMade, StepDone, TrainReport, Updated
from icmlora.training.config import MIN_STEPS
from registry.encoding import unpacked
from registry.store import Store
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import (
    TASKS,
    blob_of,
    code_blobs,
    copy_of,
    equal,
    files_of,
    generators_in,
    is_sound,
    stop_after,
    tasks_in,
)
from tests.icmlora.tiny_base import LABEL


@pytest.fixture
def larger(fleet: Fleet, tmp_path: Path) -> Fleet:
    """The trained fleet with one task that has no code yet."""
    fleet.ingest([write_lora(tmp_path / "new" / "odes", seed=7)])
    return fleet


@pytest.fixture
def wider(fleet: Fleet, tmp_path: Path) -> Fleet:
    """The trained fleet with a task of a rank that the generator does not cover."""
    fleet.ingest([write_lora(tmp_path / "new" / "epics", seed=8, rank=16)])
    return fleet


@pytest.mark.slow
def test_only_the_new_task_gets_a_code(larger: Fleet) -> None:
    before = code_blobs(larger)
    report = larger.update(device="cpu", steps=2, refine=0, evaluate=False)
    assert report.tasks == ["odes"]
    assert {name: digest for name, digest in code_blobs(larger).items() if name != "odes"} == before


@pytest.mark.slow
def test_the_report_has_the_sizes_of_the_files(larger: Fleet) -> None:
    (updated,) = larger.update(device="cpu", steps=2, refine=0, evaluate=False).updated
    assert updated.codes_size == blob_of(larger, code_blobs(larger)["odes"]).stat().st_size
    assert updated.generator_size == blob_of(larger, updated.generator).stat().st_size
    assert (updated.base_model, updated.left_out) == (LABEL, {})


@pytest.mark.slow
def test_a_generator_that_covers_the_new_task_is_kept(larger: Fleet) -> None:
    (before,) = generators_in(larger)
    (updated,) = larger.update(device="cpu", steps=2, refine=0, evaluate=False).updated
    assert (updated.added, updated.epochs, updated.version) == ((), 1, 1)
    assert updated.generator == before.blob
    assert updated.kept_size is not None


@pytest.mark.slow
def test_each_new_code_is_told_and_then_the_generator(larger: Fleet) -> None:
    heard: list[Event] = []
    report = Fleet(larger.path, on_event=heard.append).update(device="cpu", steps=2, refine=0, evaluate=False)
    told = [event for event in heard if isinstance(event, CodeMade | Updated)]
    assert [type(event) for event in told] == [CodeMade, Updated]
    assert told[1] == report.updated[0]


def test_without_a_new_task_no_byte_changes(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    assert fleet.update(device="cpu", steps=2, refine=0, evaluate=False).tasks == []
    assert files_of(fleet.path) == before


@pytest.mark.slow
def test_a_task_that_is_not_covered_gets_a_network_of_its_own(wider: Fleet) -> None:
    before = {name: wider.load(name, source="code") for name in TASKS}
    (updated,) = wider.update(device="cpu", steps=4, refine=0, evaluate=False).updated
    assert (updated.added, updated.epochs, updated.version, updated.tasks) == (["fresh"], 2, 2, ["epics"])
    assert all(equal(wider.load(name, source="code"), before[name]) for name in TASKS)
    assert [version.networks for version in wider.generators()] == [1, 2]


@pytest.mark.slow
def test_evicted_tasks_are_no_obstacle(larger: Fleet) -> None:
    larger.evict(TASKS, max_error=0.7)
    before = larger.load("rules")
    assert larger.update(device="cpu", steps=2, refine=0, evaluate=False).tasks == ["odes"]
    assert equal(larger.load("rules"), before)


@pytest.mark.slow
def test_a_higher_quality_gives_a_smaller_error(larger: Fleet) -> None:
    larger.update(device="cpu", steps=2, quality=8, refine=0, evaluate=False)
    code = tasks_in(larger)["odes"].code
    assert code is not None
    assert code.asked is not None
    assert code.asked.tolerance == 0.012
    assert code.squared_error is not None
    assert code.squared_error < 0.05


def test_the_first_generator_is_not_made_by_an_update(ingested: Fleet) -> None:
    with pytest.raises(DataError, match="has no generator to add tasks to") as error:
        ingested.update(device="cpu", refine=0, evaluate=False)
    assert f"--base-model {LABEL}" in str(error.value.hint)


def test_a_base_model_without_a_generator_is_told_first_and_the_others_are_updated(
    larger: Fleet, tmp_path: Path
) -> None:
    larger.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="zeta/elsewhere")])
    told: list[Event] = []
    report = Fleet(larger.path, on_event=told.append).update(device="cpu", steps=2, refine=0, evaluate=False)
    assert report.tasks == ["odes"]
    assert [failed.message for failed in report.failed_bases] == ["zeta/elsewhere has no generator to add tasks to"]
    assert next(event for event in told if not isinstance(event, Progress)) == report.failed_bases[0]
    with pytest.raises(DataError, match="zeta/elsewhere has no generator"):
        larger.update(device="cpu", base_model="zeta/elsewhere", refine=0, evaluate=False)


@pytest.mark.one_case
@pytest.mark.parametrize("count", [1, 3])
def test_a_stopped_update_changes_nothing_and_the_next_one_finishes(wider: Fleet, count: int) -> None:
    before, versions = code_blobs(wider), wider.generators()
    with pytest.raises(Cancelled) as stopped:
        Fleet(wider.path, on_event=stop_after(count)).update(device="cpu", steps=4, refine=0, evaluate=False)
    assert stopped.value.report == TrainReport()
    assert (code_blobs(wider), wider.generators(), is_sound(wider)) == (before, versions, True)
    assert wider.update(device="cpu", steps=4, refine=0, evaluate=False).tasks == ["epics"]


def kept_codes(fleet: Fleet) -> list[object]:
    """Return the codes of new tasks that are not published yet."""
    with Store.open(fleet.path, read_only=True) as store:
        run, generator = store.run(LABEL), store.generator(LABEL)
        batches = [] if run is None else [unpacked(store.blobs.read(file)) for file in run.codes]
    assert generator is not None
    return [code for batch in batches if batch["generator"] == generator.blob for code in batch["codes"]]


def test_a_stopped_update_keeps_codes_and_steps_and_ends_with_the_same_bytes(larger: Fleet, tmp_path: Path) -> None:
    larger.ingest([write_lora(tmp_path / "new" / "plays", seed=8)])
    whole = copy_of(larger.path, tmp_path / "whole")
    whole.update(device="cpu", steps=6, refine=0, evaluate=False)
    with pytest.raises(Cancelled):
        Fleet(larger.path, on_event=stop_after(3, StepDone)).update(device="cpu", steps=6, refine=0, evaluate=False)
    assert len(kept_codes(larger)) == 2
    heard = list[Event]()
    Fleet(larger.path, on_event=heard.append).update(device="cpu", steps=6, refine=0, evaluate=False)
    assert [event.at.step for event in heard if isinstance(event, StepDone)] == [4, 5, 6]
    assert code_blobs(larger) == code_blobs(whole)
    assert (kept_codes(larger), is_sound(larger)) == ([], True)


def test_many_new_tasks_take_no_more_steps_than_a_first_training(fleet: Fleet, tmp_path: Path) -> None:
    for seed in range(24):
        write_lora(tmp_path / "new" / f"task-{seed}", seed=seed)
    fleet.ingest([tmp_path / "new"])
    heard = list[Event]()

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepDone):
            raise Cancelled

    with pytest.raises(Cancelled):
        Fleet(fleet.path, on_event=listen).update(device="cpu", refine=0, evaluate=False)
    (step,) = [event for event in heard if isinstance(event, StepDone)]
    assert step.at.steps <= MIN_STEPS
