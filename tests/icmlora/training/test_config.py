"""The options of a run."""

from __future__ import annotations

import pytest

from icmlora.errors import GeneratorError
from icmlora.training.config import TrainConfig, steps_for


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
    assert (steps_for(1), steps_for(300), steps_for(10**6)) == (1_000, 3_000, 20_000)
