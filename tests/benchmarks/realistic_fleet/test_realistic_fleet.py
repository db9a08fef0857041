"""The recipes of the realistic fleet, and the windows that its adapters are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.rate_distortion.summary import OURS
from tests.benchmarks.realistic_fleet.__main__ import Windows, record
from tests.benchmarks.realistic_fleet.figure import Spot, curves
from tests.benchmarks.realistic_fleet.stores import NAMES
from tests.benchmarks.realistic_fleet.tasks import QWEN, TASKS


def test_every_task_has_a_text_and_a_base_model_that_stores_are_made_for() -> None:
    assert all(task.domain in DOMAINS and task.base_model in NAMES for task in TASKS)


def test_names_are_different_and_all_base_models_and_ranks_occur() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) >= 8
    assert {task.base_model for task in TASKS} == set(NAMES)
    assert {task.rank for task in TASKS} == {16, 32}
    # A step on the largest base model takes half a minute.
    assert all((100 if task.base_model == QWEN else 300) <= task.steps <= 1000 for task in TASKS)


def test_windows_reach_from_the_beginning_of_the_text_to_its_end() -> None:
    windows = Windows(torch.arange(1000), 5)
    starts = [int(windows[number]["input_ids"][0]) for number in range(len(windows))]
    assert starts == [0, 186, 372, 558, 744]
    assert all(len(windows[number]["labels"]) == 256 for number in range(len(windows)))


def test_each_task_is_added_to_the_record(tmp_path: Path) -> None:
    for task in TASKS[:2]:
        record(tmp_path, task, 2.5, 2.0)
    rows = json.loads((tmp_path / "tasks.json").read_text())
    assert [row["name"] for row in rows] == [task.name for task in TASKS[:2]]
    assert rows[0]["alpha"] == 2 * TASKS[0].rank


def test_a_curve_has_what_each_quality_keeps_of_the_tasks_of_a_base_model() -> None:
    def point(name: str, share: float, gain: float) -> dict[str, object]:
        tasks = [{"task": "gemma-verilog"}, {"task": "gemma-bible-kjv"}]
        return {"family": OURS, "name": name, "marginal_share": share, "gain": gain, "worst": 0.9, "by_task": tasks}

    study = {"points": [point("refined-4", 0.03, 1.0), point("refined-0.8", 0.004, 0.95), point("plain-4", 0.09, 0.9)]}
    kept = [
        {"task": task, "asked": asked, "on_other_text": found}
        for task, asked, found in [
            ("gemma-verilog", 0.98, 0.97),
            ("gemma-bible-kjv", 0.98, 0.98),
            ("gemma-verilog", 0.8, 0.82),
            ("gemma-bible-kjv", 0.8, 0.78),
            ("python", 0.98, 0.5),
        ]
    ]
    assert curves(kept, [study]) == {"Gemma 3 270M": [Spot(0.004, 0.8, 0.95, 0.9), Spot(0.03, 0.975, 1.0, 0.9)]}
