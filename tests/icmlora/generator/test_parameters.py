"""A network's parameters as words: what comes back, and how far it is from what went in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.files.network_file import parameters_to_words, words_to_parameters

State = dict[str, torch.Tensor]


def there_and_back(state: State) -> State:
    return words_to_parameters(parameters_to_words(state), {name: tensor.shape for name, tensor in state.items()})


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ordinary_rows_come_back_to_a_hundredth_of_their_energy() -> None:
    rows = normal(5, 400) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6])[:, None]
    lost = (there_and_back({"a": rows})["a"] - rows).square().sum(1) / rows.square().sum(1)
    assert float(lost.max()) < 0.01


def test_an_ordinary_row_takes_about_four_bits_a_value() -> None:
    assert len(parameters_to_words({"a": normal(10, 1000)})) < 4.3 * 10_000 / 8


@given(exponents=st.lists(st.integers(-90, 90), min_size=1, max_size=6), zeros=st.sets(st.integers(0, 5)))
def test_rows_of_any_size_and_rows_of_zeros_come_back(exponents: list[int], zeros: set[int]) -> None:
    rows = normal(len(exponents), 7) * torch.exp2(torch.tensor(exponents, dtype=torch.float32))[:, None]
    for row in zeros & set(range(len(rows))):
        rows[row] = 0.0
    back = there_and_back({"a": rows})["a"]
    assert torch.equal(back == 0, (back == 0) | (rows == 0))
    assert float((back - rows).abs().max()) <= float(rows.abs().max()) / 4


@given(seed=st.integers(0, 10**6), spread=st.floats(0, 6), layers=st.integers(1, 4))
def test_tables_and_weights_come_back_exactly(seed: int, spread: float, layers: int) -> None:
    tables = {name: (8 * spread * normal(2, layers, 3, seed=seed)).round() / 8 for name in ("norm_mean", "spread")}
    weights = {f"weight_{n}": (2 * spread * normal(layers, 5, seed=seed + n)).round() / 2 for n in range(3)}
    state = tables | weights
    assert all(torch.equal(there_and_back(state)[name], state[name]) for name in state)


def test_weights_that_another_module_has_up_to_a_factor_are_nearly_free() -> None:
    weights = (2 * normal(3, 400)).round() / 2
    alone = len(parameters_to_words({"weight_0": weights}))
    assert len(parameters_to_words({"weight_0": weights, "weight_1": weights + 1.5})) < 1.15 * alone


def test_vectors_and_single_values_keep_their_shape() -> None:
    state = {"bias": normal(6), "table": normal(2, 3, 4)}
    assert {name: tensor.shape for name, tensor in there_and_back(state).items()} == {
        "bias": (6,),
        "table": (2, 3, 4),
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_written(value: float) -> None:
    with pytest.raises(GeneratorError, match="diverged"):
        parameters_to_words({"a": torch.tensor([1.0, value])})


@given(words=st.binary(max_size=60).map(lambda data: data + b"\0" * (-len(data) % 4)))
def test_any_words_are_parameters_or_refused(words: bytes) -> None:
    shapes = {"a": torch.Size((2, 3)), "spread": torch.Size((2, 4)), "weight_0": torch.Size((2, 3))}
    try:
        state = words_to_parameters(words, shapes)
    except CodeError:
        return
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
