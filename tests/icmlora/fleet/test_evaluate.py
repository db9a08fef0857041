"""`Fleet.evaluate` and `measurable`: what is measured, recorded and left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from icmlora import BaseModelNotFound, Cancelled, DataError, Fleet, TaskNotFound
from icmlora.fleet.measure.report import EvaluateReport, Measurable, TaskEvaluated
from tests.icmlora.fleet.stores import files_of, is_sound, stop_after, tasks_in
from tests.icmlora.tiny_base import LABEL


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of held-out text that no task has."""
    file = tmp_path / "other.jsonl"
    file.write_text("".join(json.dumps({"text": f"white horses {number}"}) + "\n" for number in range(3)))
    return file


def test_base_model_and_original_are_always_measured(learned: Fleet) -> None:
    (task,) = learned.evaluate(["apples"], sources=[], device="cpu").done
    assert set(task.sources) == {"base", "original"}
    assert task.sources["original"].score.value < task.sources["base"].score.value
    assert task.sources["base"].retained_gain is None


def test_a_gain_is_the_share_of_what_the_original_gains(learned: Fleet) -> None:
    (task,) = learned.evaluate(["apples"], sources=["code"], device="cpu").done
    losses = {name: result.score.value for name, result in task.sources.items()}
    gain = (losses["base"] - losses["code"]) / (losses["base"] - losses["original"])
    assert task.sources["code"].retained_gain == pytest.approx(gain)


def test_every_result_is_recorded(learned: Fleet) -> None:
    (task,) = learned.evaluate(["ships"], device="cpu").done
    recorded = {one.source: one.value for one in tasks_in(learned)["ships"].measured}
    assert recorded == {name: result.score.value for name, result in task.sources.items()}
    assert set(recorded) == {"base", "original", "code", "recalled"}


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(learned: Fleet) -> None:
    first = learned.evaluate(["ships"], device="cpu")
    before = files_of(learned.path)
    assert learned.evaluate(["ships"], device="cpu") == first
    assert files_of(learned.path) == before


@pytest.mark.slow
def test_the_best_and_the_worst_gain_are_summed_up(learned: Fleet) -> None:
    report = learned.evaluate(sources=["code"], device="cpu")
    gains = {task.task: task.sources["code"].retained_gain or 0.0 for task in report.done}
    summary = report.gain_of("code")
    assert summary is not None
    assert (summary.tasks, summary.worst, summary.worst_task) == (
        3,
        min(gains.values()),
        min(gains, key=gains.__getitem__),
    )
    assert summary.mean == pytest.approx(sum(gains.values()) / 3)
    assert report.gain_of("network") is None


def test_fewer_tokens_can_be_scored(learned: Fleet) -> None:
    (task,) = learned.evaluate(["apples"], sources=[], max_tokens=5, device="cpu").done
    assert task.sources["base"].score.count <= 4 * 5  # four texts


def test_tasks_without_text_are_named(fleet: Fleet) -> None:
    report = fleet.evaluate(sources=[], device="cpu")
    assert (report.without_data, [task.task for task in report.done]) == (["silent"], ["poems", "rules"])


def test_given_text_measures_tasks_without_text_of_their_own(fleet: Fleet, text: Path) -> None:
    report = fleet.evaluate(["silent"], sources=["code"], data=text, device="cpu")
    assert ([task.task for task in report.done], report.without_data) == (["silent"], [])
    assert {one.source for one in tasks_in(fleet)["silent"].measured} == {"base", "original", "code"}


def test_a_source_that_does_not_exist_is_named(learned: Fleet) -> None:
    with pytest.raises(DataError, match="'bogus' is not a source"):
        learned.evaluate(sources=["bogus"], device="cpu")  # type: ignore[list-item]


@pytest.mark.slow
def test_results_on_other_text_do_not_replace_those_on_the_own_text(learned: Fleet, text: Path) -> None:
    learned.evaluate(["apples"], sources=["code"], device="cpu")
    gain = learned.stats().fleets[0].tasks[0].row.gain
    learned.evaluate(["apples"], sources=["code"], data=str(text), device="cpu")
    assert len(tasks_in(learned)["apples"].measured) == 6
    assert learned.stats().fleets[0].tasks[0].row.gain == gain


def test_no_text_at_all_is_an_error(fleet: Fleet) -> None:
    with pytest.raises(DataError, match="no task has held-out text") as error:
        fleet.evaluate(["silent"], device="cpu")
    assert "eval.jsonl" in str(error.value.hint)


def test_text_that_is_not_json_lines_is_an_error_with_its_line(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary\n")
    with pytest.raises(DataError, match="line 1 is not JSON") as error:
        fleet.evaluate(data=file, device="cpu")
    assert error.value.path == str(file)


def test_an_unknown_task_changes_nothing(fleet: Fleet) -> None:
    before = files_of(fleet.path)
    with pytest.raises(TaskNotFound) as error:
        fleet.evaluate(["poem"], device="cpu")
    assert (error.value.hint, files_of(fleet.path)) == ("did you mean 'poems'?", before)


def test_without_the_base_model_nothing_can_be_measured(fleet: Fleet) -> None:
    fleet.forget_base_model(LABEL)
    with pytest.raises(BaseModelNotFound) as error:
        fleet.evaluate(device="cpu")
    assert f"icm base add {LABEL}" in str(error.value.hint)


def test_an_original_that_is_gone_has_no_gain_to_compare_with(learned: Fleet) -> None:
    learned.evict(["apples"], max_error=0.7)
    report = learned.evaluate(["apples"], sources=["code"], device="cpu")
    assert report.without_original == ["apples"]
    assert report.done[0].sources["code"].retained_gain is None


def test_an_original_that_was_measured_before_it_went_still_counts(learned: Fleet) -> None:
    learned.evaluate(["apples"], sources=[], device="cpu")
    learned.evict(["apples"], max_error=0.7)
    report = learned.evaluate(["apples"], sources=["code"], device="cpu")
    assert report.without_original == []
    assert report.done[0].sources["code"].retained_gain is not None


def test_a_stopped_evaluation_keeps_what_it_measured(learned: Fleet) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(learned.path, on_event=stop_after(1, TaskEvaluated)).evaluate(sources=[], device="cpu")
    assert isinstance(stopped.value.report, EvaluateReport)
    assert [task.task for task in stopped.value.report.done] == ["apples"]
    assert {name: len(tasks_in(learned)[name].measured) for name in ("apples", "ships")} == {"apples": 2, "ships": 0}
    assert is_sound(learned)


def test_only_named_tasks_of_the_given_base_models_are_measurable(learned: Fleet) -> None:
    assert learned.measurable([LABEL], ["ships"]) == Measurable(["ships"], [], [LABEL])
    assert learned.measurable([]) == Measurable([], [], [])
    (reason,) = learned.measurable(["acme/elsewhere"]).reasons
    assert "acme/elsewhere" in reason
