"""The bytes of a task vector: small, near what went in, and refused when they are damaged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icmlora.errors import DataError
from icmlora.vector_file import values_from_bytes, vector_to_bytes

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


def normal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_values_come_back_to_a_fifteenth_of_their_typical_size(factor: float) -> None:
    back = values_from_bytes(vector_to_bytes(factor * normal(576)))
    assert float((back - factor * normal(576)).abs().max()) < factor / 15


def test_outliers_neither_set_the_step_nor_get_lost() -> None:
    values = normal(576)
    values[[3, 77]] = torch.tensor([400.0, -2500.0])
    back = values_from_bytes(vector_to_bytes(values))
    assert float((back - values).abs().max()) < 1 / 14


def test_a_value_takes_about_five_bits() -> None:
    assert len(vector_to_bytes(normal(576))) < 5.5 * 576 / 8 + 24


@given(st.lists(FLOATS, min_size=1, max_size=40))
def test_any_finite_values_are_read_back_near_what_they_were(values: list[float]) -> None:
    exact = torch.tensor(values)
    back = values_from_bytes(vector_to_bytes(exact))
    assert back.shape == exact.shape
    assert float((back - exact).abs().max()) <= float(exact.abs().max()) / 8 + 1e-30


def test_zeros_come_back_as_zeros() -> None:
    assert torch.equal(values_from_bytes(vector_to_bytes(torch.zeros(5))), torch.zeros(5))


def test_equal_vectors_have_equal_bytes() -> None:
    assert vector_to_bytes(normal(9)) == vector_to_bytes(normal(9))


@pytest.mark.parametrize("values", [torch.zeros(2, 2), torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf])])
def test_what_is_no_row_of_finite_values_is_not_written(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="finite"):
        vector_to_bytes(values)


@given(st.integers(0, 10**6))
def test_a_truncated_vector_is_refused(cut: int) -> None:
    data = vector_to_bytes(normal(20))
    with pytest.raises(DataError, match="no task vector"):
        values_from_bytes(data[: cut % len(data)])


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_refused(place: int, bit: int) -> None:
    data = bytearray(vector_to_bytes(normal(20)))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(DataError, match="no task vector"):
        values_from_bytes(bytes(data))
