"""What `Fleet.train` and `Fleet.update` do with new codes: the same as `icm train`, whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icm_cli.app import run
from icmlora import Cancelled, Fleet
from icmlora.errors import InvalidWorkers
from icmlora.fleet.context import Event, StageBegun
from icmlora.fleet.encode.report import TaskEncoded
from icmlora.fleet.measure.report import TaskEvaluated
from icmlora.fleet.train.report import TrainReport
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.stores import TASKS, code_blobs, copy_of, is_sound, stop_after, tasks_in
from tests.icmlora.tiny_base import LABEL

STEPS = 3
FEW: dict[str, Any] = {"device": "cpu", "steps": STEPS, "refine": 1}


def measured(fleet: Fleet) -> list[object]:
    """Return what is recorded of the codes: the limits of each, and every measurement."""
    return [
        (name, task.code, [(one.source, one.generator, one.value, one.retained_gain) for one in task.measured])
        for name, task in tasks_in(fleet).items()
    ]


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refine": 1}, ["--refine", "1"]),
        ({"max_error": 0.5}, ["--max-error", "0.5"]),
        ({"quality": 3, "refine": 0, "evaluate": False}, ["--quality", "3", "--refine", "0", "--no-eval"]),
    ],
    ids=lambda given: " ".join(given),
)
def test_a_training_leaves_the_bytes_and_records_of_the_command(
    ingested: Fleet, mixed: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    other = copy_of(mixed, tmp_path / "other")
    ingested.train(device="cpu", steps=STEPS, **options)
    assert run(["--store", str(other.path), "-q", "train", "--device", "cpu", "--steps", str(STEPS), *words]) == 0
    assert measured(ingested) == measured(other)


def test_an_update_leaves_the_bytes_and_records_of_the_command(fleet: Fleet, tmp_path: Path) -> None:
    fleet.ingest([write_lora(tmp_path / "more" / "extra", seed=9)])
    other = copy_of(fleet.path, tmp_path / "other")
    fleet.update(**FEW)
    words = ["--device", "cpu", "--steps", str(STEPS), "--refine", "1"]
    assert run(["--store", str(other.path), "-q", "train", "--update", *words]) == 0
    assert measured(fleet) == measured(other)


def test_codes_are_refined_and_then_measured(ingested: Fleet) -> None:
    heard = list[Event]()
    report = Fleet(ingested.path, on_event=heard.append).train(**FEW)
    assert [event.label for event in heard if isinstance(event, StageBegun)] == ["encode", "eval"]
    (encoded,) = report.encoded
    assert [(task.task, task.status) for task in encoded.done] == [(name, "encoded") for name in TASKS]
    assert report.evaluated is not None
    assert [task.task for task in report.evaluated.done] == ["poems", "rules"]
    assert not report.is_partial


def test_only_new_codes_are_refined_by_an_update(fleet: Fleet, tmp_path: Path) -> None:
    before = code_blobs(fleet)
    fleet.ingest([write_lora(tmp_path / "more" / "extra", seed=9)])
    (encoded,) = fleet.update(**FEW).encoded
    assert [task.task for task in encoded.done] == ["extra"]
    assert {name: code_blobs(fleet)[name] for name in TASKS} == before


def test_without_the_base_model_codes_stay_plain_and_the_report_says_why_nothing_is_measured(ingested: Fleet) -> None:
    ingested.forget_base_model(LABEL)
    report = ingested.train(**FEW)
    assert all(str(task.reason).startswith("not refined: ") for task in report.encoded[0].done)
    assert report.measurable is not None
    assert (report.measurable.tasks, report.evaluated) == ([], None)
    assert LABEL in report.measurable.reasons[0]


def test_a_limit_that_no_code_meets_makes_the_report_partial(ingested: Fleet) -> None:
    report = ingested.train(device="cpu", steps=STEPS, max_error=1e-6, evaluate=False)
    assert report.is_partial
    assert "silent" in {task.task for task in report.encoded[0].short}


@pytest.mark.one_case
@pytest.mark.parametrize("kind", [TaskEncoded, TaskEvaluated])
def test_a_stop_keeps_the_generator_and_what_is_done(ingested: Fleet, kind: type[Event]) -> None:
    with pytest.raises(Cancelled) as stopped:
        Fleet(ingested.path, on_event=stop_after(1, kind)).train(**FEW)
    report = stopped.value.report
    assert isinstance(report, TrainReport)
    assert [trained.base_model for trained in report.trained] == [LABEL]
    last = report.encoded[-1].done if kind is TaskEncoded else report.evaluated and report.evaluated.done
    assert len(last or ()) == 1
    assert (report.evaluated is None) == (kind is TaskEncoded)
    assert sorted(code_blobs(ingested)) == TASKS
    assert is_sound(ingested)


def test_workers_that_mean_nothing_are_refused_before_the_training(ingested: Fleet) -> None:
    with pytest.raises(InvalidWorkers):
        ingested.train(workers="many", **FEW)
    assert code_blobs(ingested) == {}


def test_an_update_without_new_tasks_does_nothing_more(fleet: Fleet) -> None:
    report = fleet.update(**FEW)
    assert isinstance(report, TrainReport)
    assert (report.encoded, report.measurable, report.evaluated) == ([], None, None)
