"""The growth study's own table."""

from __future__ import annotations

import pytest

from tests.benchmarks.growing.study import Stage
from tests.benchmarks.growing.table import drift, table


def stage(added: str, **gains: float) -> Stage:
    return Stage((added,), 2.0, 1000, 5000, gains)


def test_drift_is_the_largest_move_of_a_task_since_it_was_added() -> None:
    stages = [stage("a", a=0.9), stage("b", a=0.9, b=0.5), stage("c", a=0.89, b=0.52, c=0.1)]
    assert drift(stages) == pytest.approx(0.02)


def test_a_task_has_a_figure_for_every_stage_since_it_was_added() -> None:
    text = table([stage("a", a=0.9), stage("b", a=0.9, b=0.5)])
    assert "| a | 0.9000 | 0.9000 |" in text
    assert "| b |  | 0.5000 |" in text
    assert "| **mean** | 0.9000 | 0.7000 |" in text
