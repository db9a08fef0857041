"""Laws of the training options: the learning rate at every step, defaults for every fleet, and their JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, strategies as st

from icmlora.errors import GeneratorError
from icmlora.training.config import SMALL_FLEET, TrainConfig, is_small, steps_for

SHARES = st.floats(0, 1)
CONFIGS = st.builds(
    TrainConfig,
    steps=st.integers(1, 5000),
    learning_rate=st.floats(1e-6, 1),
    weight_decay=SHARES,
    warmup=SHARES,
    view_dropout=SHARES,
    final_share=SHARES,
    seed=st.integers(0, 2**32),
)


@given(CONFIGS)
def test_any_options_come_back_from_their_json(config: TrainConfig) -> None:
    assert TrainConfig.from_json(config.to_json()) == config
    assert list(json.loads(config.to_json())) == sorted(asdict(config))


@given(CONFIGS, st.floats(0, 1, exclude_max=True))
def test_the_rate_is_above_zero_and_never_above_its_peak(config: TrainConfig, place: float) -> None:
    rate = config.rate_at(int(place * config.steps))
    assert 0 < rate <= config.learning_rate * (1 + 1e-12)


@given(CONFIGS.filter(lambda config: config.steps >= 2))
def test_the_rate_rises_once_and_falls_once(config: TrainConfig) -> None:
    places = range(0, config.steps, max(1, config.steps // 50))
    rates = [config.rate_at(step) for step in places]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@given(CONFIGS, st.floats(0.1, 10))
def test_another_peak_changes_every_step_by_the_same_factor(config: TrainConfig, factor: float) -> None:
    other = replace(config, learning_rate=factor * config.learning_rate)
    for step in (0, config.steps // 2, config.steps - 1):
        assert other.rate_at(step) == pytest.approx(factor * config.rate_at(step), rel=1e-9)


@given(st.integers(1, 400), st.integers(0, 6000), st.integers(0, 99))
def test_the_defaults_of_any_fleet_describe_a_run(tasks: int, checkpoints: int, seed: int) -> None:
    config = TrainConfig.default(tasks, tasks + checkpoints, seed=seed)
    assert 200 <= config.steps <= 20_000
    assert (config.learning_rate > TrainConfig.learning_rate) == (tasks < SMALL_FLEET)
    assert config.seed == seed


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_larger_fleet_is_not_trained_for_fewer_steps(one: int, other: int) -> None:
    assert (steps_for(one) - steps_for(other)) * (one - other) >= 0


@given(st.integers(1, 100), st.integers(1, 10_000))
def test_a_run_of_a_given_number_of_steps_is_never_a_small_fleets(tasks: int, steps: int) -> None:
    assert not is_small(tasks, steps)
    assert TrainConfig.default(tasks, tasks, steps=steps) == TrainConfig(steps)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"warmup": -0.1},
        {"warmup": 1.1},
        {"view_dropout": 2.0},
        {"final_share": -1.0},
    ],
)
def test_options_out_of_range_are_refused_also_from_json(change: dict[str, float]) -> None:
    with pytest.raises(GeneratorError, match=r"out of range|at least 1 step"):
        replace(TrainConfig(10), **change)  # type: ignore[arg-type]
    with pytest.raises(GeneratorError):
        TrainConfig.from_json(json.dumps({**asdict(TrainConfig(10)), **change}))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[1]", "{}", '{"steps": "10"}', '{"steps": 10, "more": 1}'])
def test_anything_else_is_not_a_configuration(text: str) -> None:
    with pytest.raises(GeneratorError, match="cannot be read"):
        TrainConfig.from_json(text)
