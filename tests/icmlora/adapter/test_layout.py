"""The names of adapted modules, as a configuration gives them."""

from __future__ import annotations

import pytest

from icmlora.adapter.layout import target_modules


def layers(count: range, *parts: str) -> list[str]:
    return [f"model.layers.{layer}.{part}" for layer in count for part in parts]


def test_target_modules_are_short_where_every_layer_is_there() -> None:
    assert target_modules(layers(range(12), "self_attn.v_proj", "self_attn.q_proj")) == ("q_proj", "v_proj")


@pytest.mark.parametrize(
    "names",
    [
        layers(range(3, 6), "self_attn.q_proj"),
        layers(range(4), "self_attn.q_proj") + layers(range(2), "self_attn.v_proj"),
        layers(range(2), "self_attn.out", "cross_attn.out"),
        ["lm_head"],
    ],
)
def test_target_modules_are_in_full_where_the_short_name_would_say_more(names: list[str]) -> None:
    assert target_modules(names) == tuple(names)
