"""`Fleet.train` and `Fleet.train_few_shot`: what is reported, refused, and left by a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import BaseModelNotFound, Cancelled, DataError, DeviceUnavailable, Event, Fleet
from icmlora.errors import OptionsConflict
from icmlora.fleet.train.report import CodeMade, Continued, Resumed, StepDone, Trained, TrainReport
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import (
    TASKS,
    blob_of,
    code_blobs,
    copy_of,
    equal,
    files_of,
    generators_in,
    has_blob,
    is_sound,
    stop_after,
    tasks_in,
)
from tests.icmlora.tiny_base import LABEL

STEPS = 5


def test_the_report_has_the_sizes_of_the_files(ingested: Fleet) -> None:
    (trained,) = ingested.train(device="cpu", steps=STEPS, refine=0, evaluate=False).trained
    codes = code_blobs(ingested)
    assert (trained.base_model, trained.version, trained.tasks, trained.left_out) == (LABEL, 1, 3, {})
    assert trained.generator_size == blob_of(ingested, trained.generator).stat().st_size
    assert trained.codes_size == sum(blob_of(ingested, digest).stat().st_size for digest in codes.values())
    assert trained.metrics["steps"] == STEPS


def test_every_code_is_told_and_then_the_generator(mixed: Path) -> None:
    heard: list[Event] = []
    Fleet(mixed, on_event=heard.append).train(device="cpu", steps=STEPS, refine=0, evaluate=False)
    kinds = (StepDone, CodeMade, Trained)
    told = [event for event in heard if isinstance(event, kinds)]
    assert [type(event) for event in told] == [StepDone] * STEPS + [CodeMade] * 3 + [Trained]
    assert [event.task for event in told if isinstance(event, CodeMade)] == TASKS


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(mixed: Path, tmp_path: Path) -> None:
    digests = [
        copy_of(mixed, tmp_path / f"copy{number}")
        .train(device="cpu", steps=2, seed=seed, refine=0, evaluate=False)
        .trained[0]
        .generator
        for number, seed in enumerate((1, 1, 2))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_without_a_store_there_is_nothing_to_train_on(tmp_path: Path, base_folder: Path) -> None:
    fleet = Fleet(tmp_path / "new")
    fleet.add_base_model(LABEL, base_folder)
    with pytest.raises(DataError, match="no tasks to train on"):
        fleet.train(device="cpu", refine=0, evaluate=False)


def test_a_base_model_without_tasks_is_refused(ingested: Fleet) -> None:
    with pytest.raises(DataError, match="no task belongs to base model 'tiny/lama'"):
        ingested.train(device="cpu", base_model="tiny/lama", refine=0, evaluate=False)


@pytest.mark.slow
def test_only_the_chosen_base_model_is_trained(ingested: Fleet, tmp_path: Path) -> None:
    ingested.ingest([write_lora(tmp_path / "alien", base_model_name_or_path="acme/elsewhere")])
    report = ingested.train(device="cpu", base_model="acme/elsewhere", steps=2, refine=0, evaluate=False)
    assert [trained.base_model for trained in report.trained] == ["acme/elsewhere"]
    assert list(code_blobs(ingested)) == ["alien"]


def test_a_device_that_does_not_exist_changes_nothing(ingested: Fleet) -> None:
    before = files_of(ingested.path)
    with pytest.raises(DeviceUnavailable):
        ingested.train(device="cuda:99", refine=0, evaluate=False)
    assert files_of(ingested.path) == before


def test_a_quality_out_of_range_is_refused(ingested: Fleet) -> None:
    with pytest.raises(OptionsConflict, match="quality is 9; it must be between 1 and 8"):
        ingested.train(device="cpu", quality=9, steps=2, refine=0, evaluate=False)
    assert ingested.generators() == []


def errors(fleet: Fleet) -> dict[str, float]:
    codes = {name: task.code for name, task in tasks_in(fleet).items()}
    return {name: code.squared_error for name, code in codes.items() if code and code.squared_error}


@pytest.mark.slow
def test_a_higher_quality_has_smaller_errors(ingested: Fleet) -> None:
    ingested.train(device="cpu", steps=2, quality=1, refine=0, evaluate=False)
    coarse = errors(ingested)
    ingested.train(device="cpu", steps=2, quality=7, fresh=True, refine=0, evaluate=False)
    fine = errors(ingested)
    assert all(fine[name] < coarse[name] for name in TASKS)


@pytest.mark.slow
def test_training_again_starts_from_the_current_generator(trained: Path) -> None:
    heard: list[Event] = []
    fleet = Fleet(trained, on_event=heard.append)
    fleet.train(device="cpu", steps=2, refine=0, evaluate=False)
    first, second = generators_in(fleet)
    assert (second.trained_from, second.version) == (first.blob, 2)
    assert [event for event in heard if isinstance(event, Continued)] == [Continued(LABEL, 1, 0)]


@pytest.mark.slow
def test_a_fresh_training_has_no_parent(trained: Path) -> None:
    heard: list[Event] = []
    fleet = Fleet(trained, on_event=heard.append)
    fleet.train(device="cpu", steps=2, fresh=True, refine=0, evaluate=False)
    assert generators_in(fleet)[-1].trained_from is None
    assert not any(isinstance(event, Continued) for event in heard)


@pytest.mark.slow
def test_a_stopped_training_leaves_no_generator(ingested: Fleet) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(ingested.path, on_event=stop_after(3, StepDone)).train(
            device="cpu", steps=STEPS, refine=0, evaluate=False
        )
    assert isinstance(stopped.value.report, TrainReport)
    assert (stopped.value.report.stopped_at, stopped.value.report.trained) == (3, [])
    assert (ingested.generators(), is_sound(ingested)) == ([], True)


@pytest.mark.slow
def test_a_resumed_training_makes_the_generator_of_an_undisturbed_one(mixed: Path, tmp_path: Path) -> None:
    undisturbed = (
        copy_of(mixed, tmp_path / "copy").train(device="cpu", steps=STEPS, refine=0, evaluate=False).trained[0]
    )
    with pytest.raises(Cancelled):
        Fleet(mixed, on_event=stop_after(4, StepDone)).train(device="cpu", steps=STEPS, refine=0, evaluate=False)
    heard: list[Event] = []
    resumed = Fleet(mixed, on_event=heard.append).train(device="cpu", steps=STEPS, refine=0, evaluate=False).trained[0]
    assert resumed.generator == undisturbed.generator
    assert [event for event in heard if isinstance(event, Resumed)] == [Resumed(LABEL, 4)]


@pytest.mark.slow
def test_a_stopped_training_can_be_started_over(ingested: Fleet) -> None:
    with pytest.raises(Cancelled):
        Fleet(ingested.path, on_event=stop_after(2, StepDone)).train(
            device="cpu", steps=STEPS, refine=0, evaluate=False
        )
    (trained,) = ingested.train(device="cpu", steps=STEPS, resume=False, refine=0, evaluate=False).trained
    assert trained.metrics["resumed_from"] == 0


@pytest.mark.slow
def test_a_stop_while_encoding_keeps_the_earlier_generator_and_its_codes(trained: Path) -> None:
    fleet = Fleet(trained)
    before = code_blobs(fleet)
    with pytest.raises(Cancelled):
        Fleet(trained, on_event=stop_after(2, CodeMade)).train(device="cpu", steps=2, refine=0, evaluate=False)
    assert (code_blobs(fleet), len(fleet.generators()), is_sound(fleet)) == (before, 1, True)


@pytest.mark.slow
def test_a_stop_while_encoding_loses_no_code_and_changes_none(mixed: Path, tmp_path: Path) -> None:
    undisturbed = copy_of(mixed, tmp_path / "copy")
    undisturbed.train(device="cpu", steps=STEPS, refine=0, evaluate=False)
    with pytest.raises(Cancelled):
        Fleet(mixed, on_event=stop_after(2, CodeMade)).train(device="cpu", steps=STEPS, refine=0, evaluate=False)
    heard: list[Event] = []
    fleet = Fleet(mixed, on_event=heard.append)
    fleet.train(device="cpu", steps=STEPS, refine=0, evaluate=False)
    made = sum(isinstance(event, CodeMade) for event in heard)
    assert made == len(code_blobs(fleet)) - 2
    assert code_blobs(fleet) == code_blobs(undisturbed)
    known = [generators_in(one)[-1].metrics["initial_a_known"] for one in (fleet, undisturbed)]
    assert known[0] == known[1]
    assert is_sound(fleet)


def test_evicted_tasks_keep_their_codes_and_the_generator_that_decodes_them(fleet: Fleet) -> None:
    fleet.evict(["silent"], max_error=0.7)
    before, adapter = tasks_in(fleet)["silent"].code, fleet.load("silent")
    assert before is not None
    (trained,) = fleet.train(device="cpu", steps=2, refine=0, evaluate=False).trained
    tasks = tasks_in(fleet)
    assert (trained.tasks, trained.earlier_codes, trained.left_out) == (2, 1, {})
    assert tasks["silent"].code == before
    assert {task.code and task.code.generator == before.generator for task in tasks.values()} == {True, False}
    fleet.prune(grace=0)
    assert equal(fleet.load("silent"), adapter)
    assert is_sound(fleet)


def test_a_fleet_without_originals_cannot_be_trained(fleet: Fleet) -> None:
    fleet.evict(TASKS, max_error=0.7)
    with pytest.raises(DataError, match="every original of tiny/llama was evicted") as error:
        fleet.train(device="cpu", steps=2, refine=0, evaluate=False)
    assert "--restore" in str(error.value.hint)


def test_tasks_that_another_process_changes_during_the_training_get_their_codes(trained: Path, tmp_path: Path) -> None:
    fleet, before = Fleet(trained), tasks_in(Fleet(trained))
    write_lora(tmp_path / "more" / "later", seed=9)
    write_lora(tmp_path / "more" / "rules", seed=77)

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.at.step == 1:
            fleet.edit(["poems"], note="changed")
            fleet.edit(["silent"], name="quiet")
            fleet.ingest([tmp_path / "more"], on_conflict="version")

    (done,) = Fleet(trained, on_event=listen).train(device="cpu", steps=2, refine=0, evaluate=False).trained
    after = tasks_in(fleet)
    assert (done.tasks, list(done.left_out)) == (2, ["rules"])
    assert [name for name, task in after.items() if task.code and task.code.generator == done.generator] == [
        "poems", "quiet",
    ]  # fmt: skip
    assert (after["poems"].note, after["later"].code, after["rules"].code) == ("changed", None, None)
    assert before["poems"].code != after["poems"].code


def test_a_training_says_how_many_bytes_a_prune_frees(trained: Path) -> None:
    fleet = Fleet(trained)
    codes, (generator,) = [task.code for task in tasks_in(fleet).values()], generators_in(fleet)
    (done,) = fleet.train(device="cpu", steps=2, refine=0, evaluate=False).trained
    assert done.replaced_bytes == generator.size + sum(code.size for code in codes if code)
    fleet.prune(grace=0)
    assert not has_blob(fleet, generator.blob)


@pytest.mark.slow
def test_a_task_that_cannot_be_encoded_is_left_out_by_name(ingested: Fleet, tmp_path: Path) -> None:
    ingested.ingest([write_lora(tmp_path / "flat", alpha=1e-38)])
    (trained,) = ingested.train(device="cpu", steps=2, refine=0, evaluate=False).trained
    assert (list(trained.left_out), trained.tasks) == (["flat"], 3)
    assert tasks_in(ingested)["flat"].code is None


def test_a_few_shot_start_is_stored_with_the_generator_and_changes_no_code(
    started: Path, trained_template: Path, tmp_path: Path
) -> None:
    before, after = copy_of(trained_template, tmp_path / "before"), Fleet(started)
    assert code_blobs(after) == code_blobs(before)
    (generator,) = generators_in(after)
    assert generator.blob == generators_in(before)[0].blob
    assert generator.start is not None
    assert generator.start_size == blob_of(after, generator.start).stat().st_size


@pytest.mark.slow
def test_a_new_generator_has_no_few_shot_start(started: Path) -> None:
    (trained,) = Fleet(started).train(device="cpu", steps=2, refine=0, evaluate=False).trained
    assert trained.start_dropped
    assert generators_in(Fleet(started))[-1].start is None


def test_a_few_shot_start_needs_samples_of_two_tasks(fleet: Fleet) -> None:
    fleet.remove(["poems"])
    with pytest.raises(DataError, match="samples"):
        fleet.train_few_shot(device="cpu", episodes=1)


def test_a_few_shot_start_needs_the_base_model(fleet: Fleet) -> None:
    fleet.forget_base_model(LABEL)
    with pytest.raises(BaseModelNotFound, match=LABEL):
        fleet.train_few_shot(device="cpu", episodes=1)


def test_a_few_shot_start_needs_a_generator(ingested: Fleet) -> None:
    with pytest.raises(DataError, match="no generator"):
        ingested.train_few_shot(device="cpu", episodes=1)


@pytest.mark.slow
def test_a_stopped_few_shot_training_changes_nothing(trained: Path) -> None:
    before = Fleet(trained).generators()
    with pytest.raises(Cancelled):
        Fleet(trained, on_event=stop_after(3)).train_few_shot(device="cpu", episodes=2)
    assert Fleet(trained).generators() == before
