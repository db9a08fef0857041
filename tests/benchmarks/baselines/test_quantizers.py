"""Matrices as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.baselines.quantizers import Bf16, Int8, Nf4, Uniform, ValueQuantizer, pack, packed_size, unpack

ALL = [Bf16(), Int8(), Nf4(), *(Uniform(bits) for bits in (1, 2, 3, 4)), Uniform(3, 16), Uniform(2, None, full=True)]
SHAPES = [(1, 1), (3, 7), (8, 576), (2, 130)]


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.01 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def there_and_back(quantizer: ValueQuantizer, values: torch.Tensor) -> torch.Tensor:
    return quantizer.decode(quantizer.encode(values), *values.shape)


def error(quantizer: ValueQuantizer, values: torch.Tensor) -> float:
    return float((values - there_and_back(quantizer, values)).square().sum() / values.square().sum())


@pytest.mark.parametrize("quantizer", ALL, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_is_the_number_of_bytes(quantizer: ValueQuantizer, shape: tuple[int, int]) -> None:
    assert len(quantizer.encode(normal(*shape))) == quantizer.size(*shape)


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_zeros_stay_zeros(quantizer: ValueQuantizer) -> None:
    assert torch.equal(there_and_back(quantizer, torch.zeros(2, 70)), torch.zeros(2, 70))


@pytest.mark.parametrize("quantizer", ALL, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_size_of_the_values_does_not_matter(quantizer: ValueQuantizer, scale: float) -> None:
    assert error(quantizer, scale * normal(4, 200)) == pytest.approx(error(quantizer, normal(4, 200)), rel=0.1)


@pytest.mark.parametrize("quantizer", ALL, ids=str)
def test_no_rows_take_no_bytes(quantizer: ValueQuantizer) -> None:
    values = torch.zeros(0, 12)
    assert quantizer.encode(values) == b""
    assert there_and_back(quantizer, values).shape == (0, 12)


# Of the best uniform quantiser of a normal variable (Max, 1960): 0.3634, 0.1188, 0.0374, 0.0115.
@pytest.mark.parametrize(("bits", "expected"), [(1, 0.3634), (2, 0.1188), (3, 0.0374), (4, 0.0115)])
def test_normal_values_lose_what_theory_says(bits: int, expected: float) -> None:
    assert error(Uniform(bits), normal(2, 50_000)) == pytest.approx(expected, rel=0.03)


def test_int8_reaches_its_largest_value_exactly() -> None:
    values = torch.tensor([[1.0, -0.5, 0.25]])
    assert there_and_back(Int8(), values)[0, 0] == pytest.approx(1.0, rel=1 / 256)


def test_nf4_gives_its_own_levels_back() -> None:
    levels = there_and_back(Nf4(), torch.linspace(-1, 1, 64)[None])[0]
    assert len(levels.unique()) == 16
    assert torch.equal(there_and_back(Nf4(), levels[None])[0], levels)


def test_full_strength_keeps_the_length_along_the_original_and_costs_error() -> None:
    values = normal(1, 5_000)
    least, full = there_and_back(Uniform(1), values), there_and_back(Uniform(1, full=True), values)
    assert float((full * values).sum() / values.square().sum()) == pytest.approx(1.0, rel=0.01)
    assert float((least * values).sum() / values.square().sum()) < 0.7
    assert error(Uniform(1, full=True), values) > error(Uniform(1), values)


def test_groups_adapt_to_rows_of_uneven_loudness() -> None:
    values = normal(2, 128) * torch.cat([torch.ones(64), torch.full((64,), 20.0)])
    assert error(Uniform(3, 64), values) < error(Uniform(3), values)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_integers_of_a_few_bits_come_back(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << bits, 37).astype(np.uint8)
    data = pack(values, bits)
    assert len(data) == packed_size(37, bits) == -(-37 * bits // 8)
    assert np.array_equal(unpack(data, bits, 37), values)
