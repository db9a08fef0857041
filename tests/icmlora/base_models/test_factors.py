"""Factors that are added to a base model's modules inside a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.factors import added, factors_of

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 3, dtype=dtype), torch.arange(4.0, dtype=dtype)[:, None]


def test_the_module_computes_w_plus_b_a_inside_the_block(model: nn.Sequential) -> None:
    a, b = pair()
    expected = X @ (model[0].weight + b @ a).T + model[0].bias
    with added(model, {"0": (a, b)}):
        assert torch.allclose(model[0](X), expected)


def test_nothing_is_left_after_the_block(model: nn.Sequential) -> None:
    before = model(X)
    with pytest.raises(KeyError), added(model, {"0": pair()}):
        raise KeyError
    assert torch.equal(model(X), before)


def test_gradients_reach_the_factors(model: nn.Sequential) -> None:
    a, b = (factor.requires_grad_() for factor in pair())
    with added(model, {"0": (a, b)}):
        model(X).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.abs().sum() > 0


def test_factors_of_another_precision_are_converted(model: nn.Sequential) -> None:
    with added(model, {"0": pair(torch.float64)}):
        assert model(X).dtype == torch.float32


def test_an_adapters_factors_are_those_of_its_modules() -> None:
    module = LoraModule("0", *pair())
    assert factors_of(Adapter("base", None, ("0",), (module,))) == {"0": (module.a, module.b)}
