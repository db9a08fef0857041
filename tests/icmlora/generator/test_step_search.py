"""The search for the coarsest quantiser step: it keeps the limits, and tries few steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import GeneratorError
from icmlora.generator.codec import steps
from icmlora.generator.codec.encoding import coarsest, encode_adapter, measured
from icmlora.generator.codec.limits import Limits
from tests.icmlora.small_fleet import BASE
from tests.icmlora.untrained import untrained_codec


@dataclass(frozen=True)
class Tried:
    """A code whose errors are known without making it."""

    step: int
    squared_error: float
    weighted_error: float


class Curve:
    """Errors that grow with the step: 1 % at step 0, twice that every four steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, step: int) -> Tried:
        self.steps.append(step)
        error = 0.01 * 2 ** (step / 4)
        return Tried(step, error, error)


@given(st.integers(-60, 60), st.integers(-8, 60))
def test_the_coarsest_step_that_keeps_the_limit_is_found_from_any_start_in_reach(start: int, best: int) -> None:
    if best > start + 16 or best < start - 128:
        return
    curve = Curve()
    found = coarsest(start, Limits(tolerance=0.01 * 2 ** (best / 4) * 1.001), curve)
    assert found.step == best
    assert len(set(curve.steps)) == len(curve.steps)


def test_two_steps_are_tried_where_the_start_is_right() -> None:
    curve = Curve()
    assert coarsest(8, Limits(tolerance=0.01 * 2**2.01), curve).step == 8
    assert curve.steps == [8, 9]


def test_no_coarser_step_is_tried_where_this_one_is_coarse_enough() -> None:
    curve = Curve()
    assert coarsest(8, Limits(tolerance=0.042), curve, enough=0.9).step == 8
    assert curve.steps == [8]
    assert coarsest(8, Limits(tolerance=0.06), Curve(), enough=0.9).step > 8


def test_a_limit_that_no_step_in_reach_keeps_is_an_error() -> None:
    with pytest.raises(GeneratorError, match="no code has"):
        coarsest(200, Limits(tolerance=0.01), Curve())


@pytest.fixture(scope="module")
def large() -> Adapter:
    """An adapter of 20 layers."""
    draw = torch.Generator().manual_seed(3)
    modules = [
        LoraModule(
            f"model.layers.{layer}.self_attn.{name}_proj",
            torch.randn(4, 24, generator=draw),
            torch.randn(16, 4, generator=draw) / (1 + layer % 5),
        )
        for layer in range(20)
        for name in "qv"
    ]
    return Adapter(BASE, "CAUSAL_LM", ("q_proj", "v_proj"), tuple(modules))


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.8])
def test_a_part_of_the_layers_leads_to_nearly_the_same_code(
    large: Adapter, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = untrained_codec(large)
    whole = encode_adapter(codec, large, {}, limits=Limits(tolerance=tolerance))
    monkeypatch.setattr(steps, "_SMALL", 1000)
    part = encode_adapter(codec, large, {}, limits=Limits(tolerance=tolerance))
    assert part.weighted_error <= tolerance
    assert len(part.data) < 1.1 * len(whole.data)


def test_the_errors_of_a_code_are_those_of_what_its_bytes_decode_to(large: Adapter) -> None:
    codec = untrained_codec(large)
    encoded = encode_adapter(codec, large, {}, limits=Limits(tolerance=0.2))
    again = measured(codec, large, encoded.data)
    assert encoded.squared_error == again.squared_error
    assert encoded.weighted_error == again.weighted_error
