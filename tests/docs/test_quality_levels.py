"""The levels of quality that the documentation shows are those that were measured."""

import json
from pathlib import Path

from tests.benchmarks.quality_levels import LEVELS, RESULT, table

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "fidelity.md"


def test_the_page_has_the_table_that_was_measured() -> None:
    levels = json.loads(RESULT.read_text(encoding="utf-8"))["levels"]
    assert table(levels) in PAGE.read_text(encoding="utf-8")


def test_every_level_was_measured_on_the_same_tasks() -> None:
    levels = json.loads(RESULT.read_text(encoding="utf-8"))["levels"]
    tasks = [[row["task"] for row in levels if row["quality"] == quality] for quality in LEVELS]
    assert len(tasks[0]) > 1
    assert tasks == [tasks[0]] * len(LEVELS)
