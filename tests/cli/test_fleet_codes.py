"""What a program gets from `Fleet` for encoding, evaluating, evicting and pinning, without the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora import Cancelled, Event, Fleet, Progress
from icmlora.fleet.encode.report import EncodeReport, TaskEncoded
from icmlora.fleet.evict.types import EvictReport, TaskEvicted
from icmlora.fleet.measure.report import EvaluateReport, TaskEvaluated
from registry.errors import TaskNotFound
from tests.cli.coded import codes
from tests.icmlora.tiny_base import LABEL

NAMES = ["poems", "rules", "silent"]


def stopping_after(kind: type[Event]) -> Callable[[Event], None]:
    """Return a listener that stops the work after the first event of a kind."""

    def listen(event: Event) -> None:
        if isinstance(event, kind):
            raise Cancelled

    return listen


@pytest.mark.slow
def test_encode_tells_each_task_and_reports_them_all(trained: Path) -> None:
    events: list[Event] = []
    report = Fleet(trained, on_event=events.append).encode(max_error=0.32)
    assert [event for event in events if isinstance(event, TaskEncoded)] == report.done
    assert [task.task for task in report.done] == NAMES
    assert report.short == []


@pytest.mark.slow
def test_progress_counts_the_tasks_that_are_done(trained: Path) -> None:
    events: list[Event] = []
    Fleet(trained, on_event=events.append).encode(max_error=0.32)
    steps = [event for event in events if isinstance(event, Progress)]
    assert (steps[0], steps[-1]) == (Progress(0, 3), Progress(3, 3, "silent"))
    assert Progress(0, 3, "poems: encoding") in steps


def test_an_encode_that_is_stopped_reports_what_it_recorded(trained: Path) -> None:
    before = codes(trained)
    with pytest.raises(Cancelled) as stopped:
        Fleet(trained, on_event=stopping_after(TaskEncoded)).encode(max_error=0.055)
    report = stopped.value.report
    assert isinstance(report, EncodeReport)
    assert [task.task for task in report.done] == ["poems"]
    assert {name for name, code in codes(trained).items() if code.blob != before[name].blob} == {"poems"}


def test_an_encode_that_is_stopped_within_a_task_leaves_its_code(trained: Path) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.note.startswith("poems: "):
            raise Cancelled

    before = codes(trained)
    with pytest.raises(Cancelled):
        Fleet(trained, on_event=listen).encode(max_error=0.055)
    assert codes(trained) == before


@pytest.mark.slow
def test_a_stopped_encode_lets_go_of_the_base_model(trained: Path) -> None:
    with pytest.raises(Cancelled):
        Fleet(trained, on_event=stopping_after(TaskEncoded)).encode(max_error=0.055)
    assert Fleet(trained, lock_timeout=0).encode(max_error=0.055).done[0].status == "known"


def test_evaluate_returns_every_source_and_sums_up_their_gains(trained: Path) -> None:
    fleet = Fleet(trained)
    report = fleet.evaluate(["poems"], sources=["code"], device="cpu")
    (task,) = report.done
    assert set(task.sources) == {"base", "original", "code"}
    gain, measured = report.gain_of("code"), task.sources["code"].retained_gain
    assert (None if gain is None else gain.mean) == measured


def test_an_evaluation_that_is_stopped_reports_what_it_measured(trained: Path) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(trained, on_event=stopping_after(TaskEvaluated)).evaluate(device="cpu")
    assert isinstance(stopped.value.report, EvaluateReport)
    assert [task.task for task in stopped.value.report.done] == ["poems"]


def test_what_can_be_measured_depends_on_held_out_text_and_base_model(trained: Path) -> None:
    fleet = Fleet(trained)
    found = fleet.measurable([LABEL])
    assert (found.tasks, found.reasons) == (["poems", "rules"], [f"1 of 3 tasks of {LABEL} have no held-out text"])
    fleet.forget_base_model(LABEL)
    assert fleet.measurable([LABEL]).tasks == []


def test_evict_spares_what_is_pinned_and_reports_the_rest(trained: Path) -> None:
    fleet = Fleet(trained)
    assert [task.name for task in fleet.edit(["Rules"], pinned=True).tasks] == ["rules"]
    report = fleet.evict(max_error=0.7)
    assert {task.task: task.status for task in report.done} == {
        "poems": "evicted", "rules": "pinned", "silent": "evicted",
    }  # fmt: skip
    assert fleet.edit(["poems"], pinned=True).evicted == ["poems"]
    assert not fleet.edit(["rules"], pinned=False).tasks[0].pinned


def test_an_eviction_that_is_stopped_reports_what_is_gone(trained: Path) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(trained, on_event=stopping_after(TaskEvicted)).evict(max_error=0.7)
    assert isinstance(stopped.value.report, EvictReport)
    assert [task.task for task in stopped.value.report.gone] == ["poems"]
    assert not Fleet(trained).show("rules").task.final.is_evicted


def test_an_unknown_name_changes_nothing(trained: Path) -> None:
    fleet = Fleet(trained)
    for work in (lambda names: fleet.edit(names, pinned=True), lambda names: fleet.evict(names, max_error=0.7)):
        with pytest.raises(TaskNotFound):
            work(["poems", "nobody"])
    assert not fleet.show("poems").task.pinned
    assert not fleet.show("poems").task.final.is_evicted
