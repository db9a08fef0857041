"""A convolution is a linear layer of patches: for evidence, for statistics, and for factors put on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

from icmlora.base_models.kinds.custom_model import CustomModality, CustomModel
from icmlora.base_models.modality import BaseModel, Metric
from icmlora.base_models.running.channel_statistics import channel_statistics
from icmlora.base_models.running.conv_as_linear import input_rows, low_rank, output_rows
from icmlora.base_models.running.lora_hooks import added
from icmlora.base_models.running.modules import matrix_shape, not_matrix
from icmlora.fewshot.evidence import gather_evidence

PLAIN = [
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 4, (1, 3), padding=(0, 1), dilation=2),
    nn.Conv2d(3, 2, 1),
    nn.Linear(9, 4),
]
OTHERS = [
    nn.Conv2d(4, 4, 3, groups=2),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(3, 5, 3, padding="same"),
    nn.Conv1d(3, 5, 3),
    nn.ConvTranspose2d(3, 5, 3),
    nn.Embedding(7, 3),
]


class Images(CustomModel):
    """Two convolutions and a score of each place."""

    metric = Metric("mean", higher_is_better=True)
    hidden_size = 4

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))

    def states(self, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.model[0](torch.stack(list(examples))).mean(dim=(2, 3))  # type: ignore[index]

    def predictions(self, examples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.model(torch.stack(list(examples))).flatten(2).transpose(1, 2))

    def loss(self, examples: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.model(torch.stack(list(examples))).square().sum()

    def measure(self, examples: Sequence[torch.Tensor]) -> tuple[float, Mapping[str, float]]:
        return 0.0, {}


@pytest.fixture
def base() -> BaseModel:
    custom = Images()
    custom.model.requires_grad_(False)
    return BaseModel("images", custom.model, None, "", CustomModality("tests:load", custom), custom.hidden_size, 1)


def images(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 3, 8, 9, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("layer", PLAIN, ids=str)
@torch.no_grad()
def test_outputs_are_rows_of_inputs_times_the_weight(layer: nn.Conv2d | nn.Linear) -> None:
    inputs = torch.stack(images(2))
    outputs, weight = layer(inputs), layer.weight.flatten(1)
    assert layer.bias is not None
    assert matrix_shape(layer) == tuple(weight.shape)
    rows = input_rows(layer, inputs) @ weight.T + layer.bias
    torch.testing.assert_close(rows, output_rows(layer, outputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", PLAIN, ids=str)
@torch.no_grad()
def test_factors_add_what_their_product_adds_to_the_weight(layer: nn.Conv2d | nn.Linear) -> None:
    inputs, (outs, ins) = torch.stack(images(2)), matrix_shape(layer) or (0, 0)
    a, b = torch.randn(3, ins), torch.randn(outs, 3)
    before = layer(inputs)
    layer.weight += (b @ a).reshape(layer.weight.shape)
    torch.testing.assert_close(before + low_rank(layer, inputs, a, b), layer(inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layer", OTHERS, ids=str)
def test_other_layers_are_not_taken_for_matrices(layer: nn.Module) -> None:
    assert matrix_shape(layer) is None


def test_evidence_of_a_convolution_is_its_gradient(base: BaseModel) -> None:
    samples = base.modality.prepare(base, images(3), 1)
    found = gather_evidence(base, {}, ["0", "2"], samples, batch_size=2)
    base.model.requires_grad_()
    base.modality.loss(base, samples).backward()
    for name in ("0", "2"):
        wanted = base.model.get_submodule(name).weight.grad.flatten(1) / 3
        torch.testing.assert_close(found.modules[name].gradient, wanted, rtol=1e-3, atol=1e-5)


def test_gradients_reach_factors_on_a_convolution(base: BaseModel) -> None:
    a, b = torch.randn(2, 27, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    with added(base.model, {"0": (a, b)}):
        base.modality.loss(base, base.modality.prepare(base, images(1), 1)).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert bool(a.grad.any())
    assert bool(b.grad.any())


def test_statistics_count_every_input_of_the_kernel(base: BaseModel) -> None:
    found = channel_statistics(base, images(8), ["0", "2"], max_tokens=1)
    assert {name: (len(inputs), len(outputs)) for name, (inputs, outputs) in found.items()} == {
        "0": (27, 4),
        "2": (36, 2),
    }
    assert all(bool((part > 0).all()) for parts in found.values() for part in parts)


def test_the_first_module_that_is_no_matrix_is_named(base: BaseModel) -> None:
    assert not_matrix(base, [("0", 1, 27, 4), ("2", 1, 36, 2)]) is None
    assert not_matrix(base, [("0", 1, 27, 4), ("1", 1, 4, 4), ("2", 1, 36, 2)]) == "1"
    assert not_matrix(base, [("0", 1, 28, 4)]) == "0"
