"""Factors that are added to a base model's modules inside a block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.running.lora_hooks import added, added_by_rows, factors_of
from icmlora.errors import BaseModelUnsuited

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


def test_each_task_of_several_has_its_own_rows_whatever_its_rank_and_modules(model: nn.Sequential) -> None:
    several = [
        {"0": pair()},
        {"0": (torch.randn(3, 3), torch.randn(4, 3)), "1": (torch.randn(2, 4), torch.randn(2, 2))},
        {},
    ]
    x = torch.randn(6, 5, 3)
    with added_by_rows(model, several, 6):
        together = model(x)
    for factors, rows, found in zip(several, x.split(2), together.split(2), strict=True):
        with added(model, factors):
            torch.testing.assert_close(found, model(rows))


def test_a_module_that_does_not_see_one_row_for_each_text_is_refused(model: nn.Sequential) -> None:
    with added_by_rows(model, [{"0": pair()}, {"0": pair()}], 4), pytest.raises(BaseModelUnsuited, match="row"):
        model(torch.randn(20, 3))
