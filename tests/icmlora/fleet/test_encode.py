"""`Fleet.encode` by error: what each task gets, what is left alone, and what a stop leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, DataError, Fleet, OptionsConflict, Progress, StoreLocked, TaskNotFound
from icmlora.fleet.context import Event
from icmlora.fleet.encode.report import EncodeReport, TaskEncoded
from icmlora.training.effect import Effect, EffectLoss
from tests.icmlora.fleet.stores import TASKS, blob_of, code_blobs, files_of, is_sound, stop_after, tasks_in
from tests.icmlora.tiny_base import LABEL


@pytest.mark.slow
def test_the_report_has_the_sizes_of_the_files(fleet: Fleet) -> None:
    before = {name: task.code.size for name, task in tasks_in(fleet).items() if task.code is not None}
    report = fleet.encode(max_error=0.22)
    assert {task.task: task.before for task in report.done} == before
    sizes = {name: blob_of(fleet, digest).stat().st_size for name, digest in code_blobs(fleet).items()}
    assert {task.task: task.size for task in report.done} == sizes


@pytest.mark.slow
def test_every_code_meets_the_limit(fleet: Fleet) -> None:
    report = fleet.encode(max_error=0.22)
    assert [task.status for task in report.done] == ["encoded"] * 3
    assert all((task.relative_error or 1) <= 0.22 for task in report.done)


@pytest.mark.slow
def test_a_tighter_limit_makes_a_larger_code(fleet: Fleet) -> None:
    (coarse,) = fleet.encode(["poems"], max_error=0.55).done
    (fine,) = fleet.encode(["poems"], max_error=0.055).done
    assert coarse.size is not None
    assert fine.size is not None
    assert coarse.size < fine.size
    assert fine.before == coarse.size


@pytest.mark.slow
def test_the_same_call_again_changes_no_byte(fleet: Fleet) -> None:
    fleet.encode(max_error=0.22)
    before = files_of(fleet.path)
    assert [task.status for task in fleet.encode(max_error=0.22).done] == ["known"] * 3
    assert files_of(fleet.path) == before


@pytest.mark.slow
def test_it_encodes_again_if_asked_to(fleet: Fleet) -> None:
    first = fleet.encode(["silent"], max_error=0.22).done[0]
    again = fleet.encode(["silent"], max_error=0.22, again=True).done[0]
    assert (again.status, again.size, again.before) == ("encoded", first.size, first.size)


@pytest.mark.slow
def test_a_task_is_encoded_once_however_often_it_is_named(fleet: Fleet) -> None:
    report = fleet.encode(["silent", "SILENT", "poems"], max_error=0.55)
    assert [task.task for task in report.done] == ["poems", "silent"]


def test_tasks_that_are_not_named_keep_their_code(fleet: Fleet) -> None:
    before = code_blobs(fleet)
    fleet.encode(["silent"], max_error=0.032)
    after = code_blobs(fleet)
    assert {name for name in TASKS if after[name] != before[name]} == {"silent"}


def test_a_limit_that_no_code_meets_leaves_the_present_code_and_says_so(fleet: Fleet) -> None:
    before = code_blobs(fleet)
    report = fleet.encode(["silent"], max_error=1e-6)
    (task,) = report.done
    assert (task.status, report.short, code_blobs(fleet)) == ("below", [task], before)
    assert "relative error of 1e-06 or less" in str(task.reason)


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 9}, {"max_error": 1e-7}, {"keep": 1.0}])
def test_a_limit_out_of_range_is_refused_before_any_work(fleet: Fleet, options: dict[str, float]) -> None:
    with pytest.raises(OptionsConflict, match="must be between"):
        fleet.encode(["silent"], **options)  # type: ignore[arg-type]


def test_the_code_of_an_evicted_task_stays(fleet: Fleet) -> None:
    fleet.evict(["poems"], max_error=0.7)
    before = code_blobs(fleet)["poems"]
    (task,) = fleet.encode(["poems"], max_error=0.032).done
    assert (task.status, code_blobs(fleet)["poems"]) == ("evicted", before)


@pytest.mark.slow
def test_a_code_is_refined_without_samples_too(fleet: Fleet) -> None:
    blobs = []
    for steps in (0, 2):
        (task,) = fleet.encode(["silent"], keep=0.6, refine=steps, device="cpu").done
        assert (task.status, task.reason) == ("encoded", None)
        blobs.append(code_blobs(fleet)["silent"])
    assert blobs[0] != blobs[1]


def test_refinement_can_be_stopped_while_the_model_still_writes_its_texts(fleet: Fleet) -> None:
    encoded = code_blobs(fleet)["silent"]
    fleet.encode(["poems"], max_error=0.3, device="cpu")
    passes = []

    def stop_at_the_third_pass(event: Event) -> None:
        if isinstance(event, Progress) and "preparing to refine" in event.note:
            passes.append(event)
            if len(passes) == 3:
                raise Cancelled

    with pytest.raises(Cancelled):
        Fleet(fleet.path, on_event=stop_at_the_third_pass).encode(["silent"], keep=0.9, refine=2, device="cpu")
    assert (len(passes), code_blobs(fleet)["silent"]) == (3, encoded)


@pytest.mark.slow
def test_a_quality_refines_codes_that_are_coarser_than_plain_ones(fleet: Fleet) -> None:
    (plain,) = fleet.encode(["poems"], quality=4, refine=0, again=True).done
    (refined,) = fleet.encode(["poems"], quality=4, refine=20, device="cpu").done
    assert (plain.status, refined.status) == ("encoded", "encoded")
    assert plain.size is not None
    assert refined.size is not None
    assert refined.size < plain.size


@pytest.mark.slow
def test_a_share_of_the_effect_is_kept_with_and_without_refining(fleet: Fleet) -> None:
    sizes = dict[int, int | None]()
    for steps in (0, 128):
        (task,) = fleet.encode(["poems"], keep=0.9, refine=steps, device="cpu").done
        assert (task.status, fleet.encode(["poems"], keep=0.9, refine=steps).done[0].status) == ("encoded", "known")
        assert task.effect is not None
        assert task.effect >= 0.895
        sizes[steps] = task.size
    assert sizes[128] < sizes[0]  # type: ignore[operator]


@pytest.mark.parametrize("lost", [EffectLoss(0.5, 0.5), EffectLoss(0.0, 0.0, 0.5)], ids=["effect", "right-answers"])
def test_what_a_code_misses_of_a_quality_is_recorded_and_no_failure(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, lost: EffectLoss
) -> None:
    monkeypatch.setattr(Effect, "lost", lambda *_, **__: lost)
    statuses = []
    for options in ({"quality": 4}, {"quality": 4}, {"keep": 0.98}):
        (task,) = fleet.encode(["poems"], refine=1, device="cpu", **options).done
        code = tasks_in(fleet)["poems"].code
        assert code is not None
        assert code.asked is not None
        assert (code.effect, code.asked.is_kept) == (0.5, False)
        statuses.append(task.status)
    assert statuses == ["encoded", "known", "below"]


def test_a_share_takes_forward_passes_and_so_the_base_model(fleet: Fleet) -> None:
    fleet.forget_base_model(LABEL)
    (task,) = fleet.encode(["poems"], keep=0.9, refine=0).done
    assert task.status == "unmeasured"
    assert LABEL in str(task.reason)


def test_without_a_limit_the_quality_of_the_generator_counts(fleet: Fleet) -> None:
    (named,) = fleet.encode(["poems"], quality=4, refine=0).done
    (task,) = fleet.encode(["poems"], refine=0).done
    assert (task.status, task.size) == ("known", named.size)


def test_a_refined_code_is_known_by_its_quality(fleet: Fleet) -> None:
    fleet.encode(["poems"], quality=3, refine=2, device="cpu")
    before = files_of(fleet.path)
    (again,) = fleet.encode(["poems"], quality=3, refine=2, device="cpu").done
    assert again.status == "known", again.reason
    assert files_of(fleet.path) == before


def test_where_the_base_model_is_missing_a_quality_gives_plain_codes(fleet: Fleet) -> None:
    fleet.forget_base_model(LABEL)
    (task,) = fleet.encode(["poems"], quality=6).done
    assert task.status == "encoded"
    assert str(task.reason).startswith("not refined: ")
    assert fleet.encode(["poems"], quality=6).done[0].status == "known"


def test_a_missing_generator_is_an_error(ingested: Fleet) -> None:
    with pytest.raises(DataError, match="no generator for task 'poems'") as error:
        ingested.encode(max_error=0.32)
    assert error.value.hint == "run `icm train` to train one"


def test_another_base_model_is_an_error(fleet: Fleet) -> None:
    with pytest.raises(DataError, match="none of these tasks belongs to base model 'acme/other'"):
        fleet.encode(["poems"], max_error=0.32, base_model="acme/other")


def test_an_unknown_task_changes_nothing(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    with pytest.raises(TaskNotFound) as error:
        fleet.encode(["poems", "rulez"], max_error=0.32)
    assert (error.value.hint, files_of(fleet.path)) == ("did you mean 'rules'?", before)


@pytest.mark.slow
def test_a_new_code_forgets_what_was_measured_of_the_earlier_one(fleet: Fleet) -> None:
    fleet.evaluate(["poems"], sources=["code"], device="cpu")
    assert "code" in {one.source for one in tasks_in(fleet)["poems"].measured}
    fleet.encode(["poems"], max_error=0.1)
    assert "code" not in {one.source for one in tasks_in(fleet)["poems"].measured}


@pytest.mark.slow
def test_a_stopped_encode_is_continued_by_the_same_call(fleet: Fleet) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(fleet.path, on_event=stop_after(2, TaskEncoded)).encode(max_error=0.14)
    assert isinstance(stopped.value.report, EncodeReport)
    assert len(stopped.value.report.done) == 2
    assert is_sound(fleet)
    assert [task.status for task in fleet.encode(max_error=0.14).done] == ["known", "known", "encoded"]


def test_a_training_has_to_wait_for_an_encode(fleet: Fleet) -> None:
    other, refused = Fleet(fleet.path, lock_timeout=0), list[str]()

    def listen(event: object) -> None:
        if isinstance(event, TaskEncoded):
            with pytest.raises(StoreLocked) as error:
                other.train(device="cpu", steps=1, refine=0, evaluate=False)
            refused.append(str(error.value.hint))

    Fleet(fleet.path, on_event=listen).encode(["silent"], max_error=0.1)
    assert len(refused) == 1
    assert "--lock-timeout" in refused[0]
    assert other.encode(["silent"], max_error=0.1).done[0].status == "known"


@pytest.mark.slow
def test_a_second_fleet_object_encodes_at_the_same_time(fleet: Fleet) -> None:
    other, found = Fleet(fleet.path, lock_timeout=0), list[str]()

    def listen(event: object) -> None:
        if isinstance(event, TaskEncoded):
            found.extend(task.status for task in other.encode(["poems"], max_error=0.7).done)

    Fleet(fleet.path, on_event=listen).encode(["silent"], max_error=0.1)
    assert found == ["encoded"]
    assert is_sound(fleet)


def test_a_smaller_error_takes_a_finer_code_of_more_bytes(fleet: Fleet) -> None:
    made = [fleet.encode(["poems"], max_error=limit).done[0] for limit in (0.1, 0.001)]
    assert [task.status for task in made] == ["encoded", "encoded"]
    assert [(task.relative_error or 1) <= limit for task, limit in zip(made, (0.1, 0.001), strict=True)] == [True, True]
    assert (made[0].size or 0) < (made[1].size or 0)


def test_a_second_fleet_object_reads_while_the_first_one_works(fleet: Fleet, tmp_path: Path) -> None:
    other, seen = Fleet(fleet.path, lock_timeout=0), list[int]()

    def listen(event: object) -> None:
        if isinstance(event, TaskEncoded):
            other.materialize("poems", tmp_path / "out", source="code")
            seen.append(other.stats().tasks + len(other.tasks()))

    Fleet(fleet.path, on_event=listen).encode(["silent"], max_error=0.1)
    assert seen == [6]
