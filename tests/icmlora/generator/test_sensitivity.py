"""Weights of channels: what they are made from, and that they can be taken off again."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st

from icmlora.adapter.metrics import squared_error
from icmlora.generator.config import GeneratorConfig, ModuleKind
from icmlora.generator.sensitivity import MeanSquares, even, sensitivity_of
from tests.icmlora.small_fleet import make_adapter, mixed_fleet, uneven, weighted

CONFIG = mixed_fleet().config()


def measured(config: GeneratorConfig = CONFIG, loud: str = "", factor: float = 1.0) -> MeanSquares:
    """Return mean squares of one for every module, and `factor` for the inputs of the one named `loud`."""
    places = [(kind, kind.module(layer)) for kind in config.kinds for layer in range(config.layers)]
    return {
        name: (torch.full((kind.inputs,), factor if name == loud else 1.0), torch.ones(kind.outputs))
        for kind, name in places
    }


def test_channels_that_are_all_alike_have_weights_of_one() -> None:
    weights = sensitivity_of(CONFIG, measured())
    assert all(bool((part == 0).all()) for side in (weights.inputs, weights.outputs) for part in side)


def test_nothing_measured_means_even_weights() -> None:
    weights = sensitivity_of(CONFIG, {})
    assert all(torch.equal(*pair) for pair in zip(weights.inputs, even(CONFIG).inputs, strict=True))


def test_a_louder_input_has_a_larger_weight() -> None:
    statistics = dict(measured())
    name = CONFIG.kinds[0].module(1)
    inputs = torch.ones(CONFIG.kinds[0].inputs)
    inputs[2] = 1e4
    statistics[name] = inputs, statistics[name][1]
    row = sensitivity_of(CONFIG, statistics).inputs[0][1]
    assert row[2] > row[0]
    assert int(row.argmax()) == 2


def test_a_module_with_larger_inputs_has_larger_weights_on_both_sides() -> None:
    weights = sensitivity_of(CONFIG, measured(loud=CONFIG.kinds[0].module(1), factor=1e6))
    assert float(weights.inputs[0][1].mean()) > float(weights.inputs[0][0].mean())
    assert float(weights.outputs[0][1].mean()) > float(weights.outputs[0][0].mean())


def test_what_was_measured_of_a_module_counts_for_the_kind_that_has_its_widths() -> None:
    # Gemma 4: the layers that see everything have a wider q_proj.
    kinds = tuple(ModuleKind("layers.{}.q_proj", 4, width) for width in (8, 16))
    config = GeneratorConfig("base", kinds, 2, 1, 0, 0.1)
    narrow, wide = (torch.arange(1.0, width + 1) for width in (8, 16))
    statistics = {"layers.0.q_proj": (torch.ones(4), narrow), "layers.1.q_proj": (torch.ones(4), wide)}
    outputs = sensitivity_of(config, statistics).outputs
    measured_rows = [[bool((row != row[0]).any()) for row in kind] for kind in outputs]
    assert measured_rows == [[True, False], [False, True]]


@given(seed=st.integers(0, 10**6), exponent=st.floats(-30, 30))
def test_weights_are_bounded_halves_of_an_octave_whatever_was_measured(seed: int, exponent: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    statistics = {
        name: (10.0**exponent * torch.rand(len(left), generator=draw), torch.rand(len(right), generator=draw) ** 9)
        for name, (left, right) in measured().items()
    }
    weights = sensitivity_of(CONFIG, statistics)
    for part in (*weights.inputs, *weights.outputs):
        assert torch.equal(part, (2 * part).round() / 2)
        assert float(part.abs().max()) <= 12


def test_silent_modules_have_finite_weights() -> None:
    silent = {name: (0 * left, 0 * right) for name, (left, right) in measured().items()}
    weights = sensitivity_of(CONFIG, silent)
    assert all(bool(torch.isfinite(part).all()) for part in (*weights.inputs, *weights.outputs))


def test_taking_the_weights_off_gives_the_adapter_back() -> None:
    adapter, weights = make_adapter(0), uneven(CONFIG)
    for module in adapter.modules:
        kind, layer = CONFIG.place_of(module.shape)
        heavy = weights.weigh(module, kind, layer)
        a, b = heavy.a.clone(), heavy.b.T.clone()
        weights.unweigh(kind, torch.full((len(a),), layer), a, b)
        torch.testing.assert_close(a, module.a, rtol=1e-6, atol=0)
        torch.testing.assert_close(b.T, module.b, rtol=1e-6, atol=0)


def test_weights_change_what_an_error_is_worth() -> None:
    adapter = make_adapter(0)
    assert squared_error(adapter, weighted(adapter, CONFIG, uneven(CONFIG))) > 0.01


def test_a_profile_is_the_weights_around_their_middle() -> None:
    profile = uneven(CONFIG).profile(0, 1)
    assert float(profile.mean(dim=1).abs().max()) <= 1 / 16 + 1e-6
    steps = (profile - uneven(CONFIG).outputs[0]).diff(dim=1)
    assert float(steps.abs().max()) == 0.0
