"""Points of several runs are one study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.rate_distortion.merge import main, merged
from tests.benchmarks.rate_distortion.study import PointResult, TaskResult
from tests.benchmarks.rate_distortion.summary import report

TEXTS = {"texts": 16, "max_tokens": 256, "dtype": "bfloat16"}


def study(points: dict[str, float], *, bf16: int = 1000, **settings: Any) -> dict[str, Any]:
    """Return a study of two tasks in which a point has some size and keeps the more of the gain the larger it is."""
    results = [
        PointResult(
            "icm" if name.startswith("icm") else name,
            name,
            10,
            tuple(TaskResult(task, int(size), bf16, 0.1, 2.0, size / bf16) for task in ("rust", "sql")),
            {},
        )
        for name, size in points.items()
    ]
    return {"date": "2026-11-25", "machine": {}, "settings": TEXTS | settings, **report(results)}


def test_it_has_the_points_of_all_and_rates_over_them() -> None:
    both = merged([study({"nf4": 500, "int8": 900}), study({"icm-1": 100, "icm-2": 600})])
    assert [point["name"] for point in both["points"]] == ["nf4", "int8", "icm-1", "icm-2"]
    assert both["settings"] == TEXTS
    assert set(both["bd_rates"]) == {"nf4", "int8", "best of all", "best as published"}


def test_a_later_point_of_the_same_name_takes_the_place_of_the_earlier_one() -> None:
    both = merged([study({"nf4": 500}), study({"nf4": 600})])
    assert [point["by_task"][0]["size"] for point in both["points"]] == [600]


def test_the_default_is_that_of_the_last_study_that_names_one() -> None:
    old, new = study({"icm-1": 100}) | {"default": "icm-1"}, study({"icm-2": 90}) | {"default": "icm-2"}
    assert merged([old, new, study({"nf4": 500})])["default"] == "icm-2"
    assert merged([study({"nf4": 500})])["default"] is None


def test_a_point_that_was_measured_otherwise_says_so() -> None:
    both = merged([study({"nf4": 500}), study({"icm-1": 100}, texts=4)])
    assert [point["notes"].get("settings", {}).get("texts") for point in both["points"]] == [None, 4]


def test_studies_of_different_fleets_are_refused() -> None:
    with pytest.raises(SystemExit, match="different fleets"):
        merged([study({"nf4": 500}), study({"nf4": 500}, bf16=2000)])


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps(study({"nf4": 500})))
    (tmp_path / "b.json").write_text(json.dumps(study({"icm-1": 100})))
    main([str(tmp_path / name) for name in ("a.json", "b.json")] + ["--out", str(tmp_path / "all.json")])
    assert len(json.loads((tmp_path / "all.json").read_text())["points"]) == 2
    assert "| icm | icm-1 |" in capsys.readouterr().out
