"""The options of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from icmlora.errors import GeneratorError
from icmlora.training import config
from icmlora.training.config import SMALL_FLEET, TrainConfig, is_small, steps_for


def test_options_come_back_from_their_json() -> None:
    config = TrainConfig(steps=17, learning_rate=0.1 + 0.2, seed=5)
    assert TrainConfig.from_json(config.to_json()) == config


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [config.rate_at(step) for step in range(100)]
    peak = rates.index(max(rates))
    assert peak in (9, 10)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == 0.1
    assert 0 <= rates[-1] < 0.01


@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_every_step_of_the_shortest_run_has_a_positive_rate(warmup: float) -> None:
    assert TrainConfig(steps=1, warmup=warmup).rate_at(0) > 0


@pytest.mark.parametrize(
    "text",
    ['{"steps": 0}', '{"steps": 1, "learning_rate": 0}', '{"steps": 1, "warmup": 2}', '{"steps": 1, "final_share": -1}',
     '{"steps": 1, "view_dropout": 1.5}', '{"steps": "x"}', "[]", "{}", "", "null"],
)  # fmt: skip
def test_options_that_describe_no_run_are_refused(text: str) -> None:
    with pytest.raises(GeneratorError):
        TrainConfig.from_json(text)


def test_a_larger_fleet_is_trained_for_longer_within_bounds() -> None:
    assert (steps_for(1), steps_for(300), steps_for(10**6)) == (1_000, 2_400, 20_000)


@pytest.mark.parametrize(("parameters", "steps"), [(268_800, 500), (1_500_000, 1_500), (10**9, 2_400)])
def test_small_adapters_are_trained_for_fewer_steps(parameters: int, steps: int) -> None:
    assert steps_for(300, parameters) == steps
    assert TrainConfig.default(300, 300, parameters=parameters).steps == steps


@pytest.mark.parametrize(("tasks", "steps"), [(1, 200), (5, 200), (12, 240), (SMALL_FLEET - 1, 300)])
def test_a_small_fleet_is_trained_briefly_at_a_higher_rate(tasks: int, steps: int) -> None:
    assert TrainConfig.default(tasks, 10 * tasks, seed=3) == TrainConfig(steps=steps, learning_rate=8e-3, seed=3)


@pytest.mark.parametrize(("tasks", "adapters", "steps"), [(SMALL_FLEET, 30, 1_000), (40, 300, 2_400)])
def test_a_larger_fleet_is_trained_for_its_adapters(tasks: int, adapters: int, steps: int) -> None:
    assert TrainConfig.default(tasks, adapters) == TrainConfig(steps=steps)


@pytest.mark.parametrize(("tasks", "draws"), [(4, 1_200), (20, 1_200), (1_000, 8_000)])
def test_a_run_whose_steps_see_eight_adapters_has_at_least_150_of_them(tasks: int, draws: int) -> None:
    assert TrainConfig.default(tasks, tasks, stacked=8).steps == draws
    assert TrainConfig.default(tasks, tasks, stacked=8, steps=40).steps == 40


@pytest.mark.parametrize("tasks", [1, 10, 100])
def test_steps_that_were_asked_for_leave_everything_else_at_its_usual_value(tasks: int) -> None:
    assert TrainConfig.default(tasks, tasks, steps=7) == TrainConfig(steps=7)
    assert not is_small(tasks, steps=7)


def test_a_learning_rate_that_was_asked_for_changes_no_steps() -> None:
    assert TrainConfig.default(10, 10, learning_rate=1e-3) == TrainConfig(steps=200, learning_rate=1e-3)


def test_a_training_without_steps_is_refused_and_not_the_default() -> None:
    with pytest.raises(GeneratorError, match="at least 1 step, not 0"):
        TrainConfig.default(4, 4, steps=0)


def test_the_page_about_training_says_how_long_it_takes() -> None:
    page = " ".join((Path(__file__).parents[3] / "docs" / "concepts" / "generator.md").read_text("utf-8").split())
    assert f"fewer than {SMALL_FLEET} tasks, training takes {config.SMALL_STEPS_PER_TASK} steps per task" in page
    assert f"at least {config.MIN_SMALL_STEPS}, at a peak learning rate of {config.SMALL_RATE:g}" in page
    steps = f"{config.MIN_STEPS:,} to {config.MAX_STEPS:,} steps) at {config.RATE:g}"
    assert f"{config.STEPS_PER_ADAPTER} steps per adapter (checkpoints included, {steps}" in page
    assert f"beyond {config.FREE_STEPS} steps there is at most one for every {config.PARAMETERS_PER_STEP:,}" in page
    assert f"at least {config.MIN_STACKED_STEPS} steps" in page
