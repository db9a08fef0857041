"""What a generator is made for, and which configurations are none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import GeneratorError
from icmlora.generator.config import GeneratorConfig, ModuleKind, config_for, kind_of, tolerance_of
from tests.icmlora.small_fleet import BASE, HIDDEN, make_adapter, mixed_fleet

Q = ModuleShape("model.layers.7.self_attn.q_proj", 2, 6, 5)
NAME = st.from_regex(r"[a-z0-9_]{1,6}(\.[a-z0-9_]{1,6}){0,4}", fullmatch=True)


def test_a_module_is_a_kind_and_a_layer() -> None:
    assert kind_of(Q) == (ModuleKind("model.layers.{}.self_attn.q_proj", 6, 5), 7)


def test_a_module_without_a_number_is_in_layer_0() -> None:
    assert kind_of(ModuleShape("lm_head", 2, 6, 5)) == (ModuleKind("lm_head", 6, 5), 0)


@given(name=NAME)
def test_a_module_name_comes_back_from_its_kind_and_layer(name: str) -> None:
    kind, layer = kind_of(ModuleShape(name, 1, 2, 3))
    assert kind.module(layer) == name


def test_a_layer_number_of_many_digits_does_not_ask_for_that_many_layers() -> None:
    assert (
        config_for(BASE, [[ModuleShape("h.99999999999.q", 1, 2, 3)]], tasks=64, condition_size=0, quality=1).layers == 1
    )


def test_a_configuration_covers_every_adapter_of_its_fleet() -> None:
    config = mixed_fleet().config()
    assert (len(config.kinds), config.layers, config.slots) == (3, 2, 4)
    assert all(config.place_of(shape)[0] < 3 for layout in mixed_fleet().layouts() for shape in layout)


def test_a_configuration_comes_back_from_its_json() -> None:
    config = mixed_fleet().config()
    assert GeneratorConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "shape",
    [
        ModuleShape("model.layers.0.self_attn.o_proj", 2, HIDDEN, HIDDEN),
        ModuleShape("model.layers.0.self_attn.q_proj", 2, HIDDEN, HIDDEN + 1),
        ModuleShape("model.layers.2.self_attn.q_proj", 2, HIDDEN, HIDDEN),
        ModuleShape("model.layers.0.self_attn.q_proj", 5, HIDDEN, HIDDEN),
    ],
)
def test_another_kind_shape_layer_or_rank_is_not_covered(shape: ModuleShape) -> None:
    with pytest.raises(GeneratorError, match="does not cover"):
        mixed_fleet().config().place_of(shape)


def test_a_grown_configuration_covers_the_old_fleet_and_the_new() -> None:
    old = mixed_fleet().config(quality=8)
    layout = make_adapter(9, rank=6, kinds=("v_proj",)).layout
    grown = config_for(BASE, [layout], tasks=64, condition_size=HIDDEN, quality=2, previous=old)
    assert set(old.kinds) <= set(grown.kinds)
    assert (grown.slots, grown.width, grown.tolerance) == (6, old.width, tolerance_of(2))


def test_a_higher_quality_loses_less() -> None:
    tolerances = [tolerance_of(quality) for quality in range(1, 9)]
    assert tolerances == sorted(tolerances, reverse=True)


@pytest.mark.parametrize("quality", [-1, 0, 9])
def test_a_quality_outside_1_to_8_is_refused(quality: int) -> None:
    with pytest.raises(GeneratorError, match="quality"):
        tolerance_of(quality)


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": []},
        {"kinds": [{"pattern": "q", "inputs": -1, "outputs": 2}]},
        {"kinds": [{"pattern": "q", "inputs": 1, "outputs": 2}] * 2},
        {"kinds": [{"pattern": "q"}]},
        {"kinds": 3},
        {"slots": 4097},
        {"layers": 0},
        {"width": 0},
        {"condition_size": -1},
        {"tolerance": 0},
        {"tolerance": 1.5},
        {"tolerance": "small"},
        {"surprise": 1},
    ],
)
def test_a_configuration_that_describes_no_network_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(mixed_fleet().config().to_json()) | change
    with pytest.raises(GeneratorError):
        GeneratorConfig.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", "[" * 100_000])
def test_json_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises(GeneratorError):
        GeneratorConfig.from_json(text)
