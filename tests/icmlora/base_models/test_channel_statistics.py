"""Mean squares of a base model's inputs and gradients, module by module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from icmlora.base_models.examples.examples import plain
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.channel_statistics import channel_statistics
from tests.icmlora.tiny_base import load_tiny_base

MODULES = [f"model.layers.{layer}.self_attn.{kind}" for layer in (0, 1) for kind in ("q_proj", "o_proj")]
TEXTS = ["the first text", "another, which is longer"]
SAMPLES = plain(TEXTS)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


def test_inputs_are_those_of_a_forward_pass(base: BaseModel) -> None:
    seen: list[torch.Tensor] = []
    module = base.model.get_submodule(MODULES[2])
    with module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()[0])):
        base.model(torch.tensor([base.tokenizer(TEXTS[0])["input_ids"]]))
    inputs, _ = channel_statistics(base, SAMPLES[:1], MODULES, max_tokens=1000)[MODULES[2]]
    torch.testing.assert_close(inputs, seen[0].square().mean(dim=0), rtol=1e-4, atol=1e-6)


def test_every_module_has_its_sizes_and_gradients_that_are_not_zero(base: BaseModel) -> None:
    statistics = channel_statistics(base, SAMPLES, MODULES, max_tokens=1000)
    assert sorted(statistics) == sorted(MODULES)
    for name, (inputs, outputs) in statistics.items():
        weight = base.model.get_submodule(name).weight
        assert (len(outputs), len(inputs)) == tuple(weight.shape)
        assert float(outputs.sum()) > 0


def test_the_same_texts_give_the_same_figures(base: BaseModel) -> None:
    first, second = (channel_statistics(base, SAMPLES, MODULES, max_tokens=1000) for _ in range(2))
    assert all(
        torch.equal(left, right) for name in MODULES for left, right in zip(first[name], second[name], strict=True)
    )


def test_reading_stops_once_there_are_enough_tokens(base: BaseModel) -> None:
    enough = channel_statistics(base, SAMPLES * 5, MODULES, max_tokens=5)
    alone = channel_statistics(base, SAMPLES * 4, MODULES, max_tokens=1000)  # never fewer than eight examples
    assert torch.equal(enough[MODULES[0]][0], alone[MODULES[0]][0])


def test_a_module_that_the_model_lacks_is_left_out(base: BaseModel) -> None:
    assert channel_statistics(base, SAMPLES, ["model.layers.9.q_proj"], max_tokens=1000) == {}


def test_no_text_gives_no_figures(base: BaseModel) -> None:
    assert channel_statistics(base, [], MODULES, max_tokens=1000) == {}


def test_the_model_is_left_as_it_was(base: BaseModel) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    channel_statistics(base, SAMPLES, MODULES, max_tokens=1000)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert not any(module._forward_hooks for module in base.model.modules())
