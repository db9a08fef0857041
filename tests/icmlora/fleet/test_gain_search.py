"""`Fleet.encode` by retained gain, on adapters that were trained and help on their own held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora import Cancelled, Event, Fleet, Progress
from icmlora.fleet.encode.encode import TaskEncoded
from tests.icmlora.fleet.stores import code_blobs, files_of, is_sound, tasks_in
from tests.icmlora.tiny_base import LABEL


def test_the_code_keeps_the_gain_and_is_smaller_than_that_of_the_training(learned: Fleet) -> None:
    (task,) = learned.encode(["apples"], min_gain=0.9, device="cpu").tasks
    assert task.status == "encoded"
    assert task.retained_gain is not None
    assert task.retained_gain >= 0.9
    assert task.size is not None
    assert task.before is not None
    assert task.size < task.before


@pytest.mark.slow
def test_the_gain_of_the_chosen_code_is_recorded_with_those_it_is_compared_to(learned: Fleet) -> None:
    (task,) = learned.encode(["apples"], min_gain=0.9, device="cpu").tasks
    rows = {one.source: one for one in tasks_in(learned)["apples"].measured}
    assert set(rows) == {"base", "original", "code"}
    assert rows["code"].retained_gain == task.retained_gain
    assert rows["original"].value < rows["code"].value < rows["base"].value


@pytest.mark.slow
def test_measuring_the_code_again_finds_the_same_gain(learned: Fleet) -> None:
    (task,) = learned.encode(["ships"], min_gain=0.9, device="cpu").tasks
    report = learned.evaluate(["ships"], sources=["code"], device="cpu", again=True)
    assert report.tasks[0].sources["code"].retained_gain == task.retained_gain


@pytest.mark.slow
def test_a_higher_gain_takes_a_larger_code(learned: Fleet) -> None:
    sizes = [learned.encode(["trains"], min_gain=gain, device="cpu").tasks[0].size for gain in (0.5, 0.97)]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[0] < sizes[1]


@pytest.mark.slow
def test_a_gain_that_no_code_keeps_leaves_the_most_accurate_code(learned: Fleet) -> None:
    report = learned.encode(["apples"], min_gain=1.5, device="cpu")
    (task,) = report.tasks
    assert (task.status, report.short) == ("below", [task])
    assert (task.relative_error or 1) < 0.22
    assert [one.row.name for one in learned.stats().each if one.misses_limit] == ["apples"]


@pytest.mark.slow
def test_both_limits_hold_if_both_are_given(learned: Fleet) -> None:
    (task,) = learned.encode(["apples"], min_gain=0.5, max_error=0.14, device="cpu").tasks
    assert (task.relative_error or 1) <= 0.14
    assert task.retained_gain is not None
    assert task.retained_gain >= 0.5


@pytest.mark.slow
def test_the_same_call_again_measures_nothing_and_knows_the_gain(learned: Fleet) -> None:
    first = learned.encode(["apples"], min_gain=0.9, device="cpu").tasks[0]
    before = files_of(learned.path)
    again = learned.encode(["apples"], min_gain=0.9, device="cpu").tasks[0]
    assert (again.status, again.retained_gain) == ("known", first.retained_gain)
    assert files_of(learned.path) == before


@pytest.mark.slow
def test_new_held_out_text_makes_a_known_code_unknown(learned: Fleet, learned_template: Path, tmp_path: Path) -> None:
    learned.encode(["apples"], min_gain=0.5, device="cpu")
    folder = tmp_path / "loras" / "apples"
    folder.mkdir(parents=True)
    for file in (learned_template / "loras" / "apples").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lines = (folder / "eval.jsonl").read_text().splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(lines[:2]))
    assert learned.ingest([folder]).ingested[0].status == "updated"
    (task,) = learned.encode(["apples"], min_gain=0.5, device="cpu").tasks
    assert task.status == "encoded"


@pytest.mark.slow
def test_refined_codes_keep_the_gain_too(learned: Fleet) -> None:
    (task,) = learned.encode(["trains"], min_gain=0.8, refine=3, device="cpu").tasks
    code = tasks_in(learned)["trains"].code
    assert code is not None
    assert code.asked is not None
    assert (task.status, code.asked.refined, code.asked.min_gain) == ("encoded", 3, 0.8)
    assert task.retained_gain is not None
    assert task.retained_gain >= 0.8


def test_without_the_base_model_every_code_stays(learned: Fleet) -> None:
    before = code_blobs(learned)
    learned.forget_base_model(LABEL)
    report = learned.encode(min_gain=0.9, device="cpu")
    assert ([task.status for task in report.short], code_blobs(learned)) == (["unmeasured"] * 3, before)
    assert all(LABEL in str(task.reason) for task in report.short)


@pytest.mark.slow
def test_a_stop_within_the_search_records_nothing_of_the_task(learned: Fleet) -> None:
    before = code_blobs(learned)

    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.note.startswith("ships: "):
            raise Cancelled

    with pytest.raises(Cancelled):
        Fleet(learned.path, on_event=listen).encode(["ships"], min_gain=0.9, device="cpu")
    assert code_blobs(learned) == before
    assert "code" not in {one.source for one in tasks_in(learned)["ships"].measured}
    assert is_sound(learned)


@pytest.mark.slow
def test_a_listener_hears_each_trial_before_the_task_is_done(learned: Fleet) -> None:
    heard: list[Event] = []
    Fleet(learned.path, on_event=heard.append).encode(["apples"], min_gain=0.9, device="cpu")
    done = next(index for index, event in enumerate(heard) if isinstance(event, TaskEncoded))
    trials = [event for event in heard[:done] if isinstance(event, Progress) and event.note.startswith("apples: ")]
    assert len(trials) >= 3
    assert heard[-1] == Progress(1, 1, "apples")
