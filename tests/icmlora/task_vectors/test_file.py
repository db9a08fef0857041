"""The bytes of a task's vectors: small, near what went in, and refused when they are damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import DataError, OtherFormat
from icmlora.generator.files.container import add_checksum
from icmlora.task_vectors.file import arrays_from_bytes, vectors_from_bytes, vectors_to_bytes
from icmlora.task_vectors.vector import View

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)
SPREAD = 0.2


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def alike(sets: int = 4, size: int = 576) -> dict[View, torch.Tensor]:
    """Return two views of a task: sets that differ by a fifth of their typical size, views that are related."""
    shared = normal(size)
    other = 0.8 * shared + 0.6 * normal(size, seed=1)
    return {
        "adapted": shared + SPREAD * normal(sets, size, seed=2),
        "context": other + SPREAD * normal(sets, size, seed=3),
    }


def errors(views: dict[View, torch.Tensor]) -> dict[View, torch.Tensor]:
    back = vectors_from_bytes(vectors_to_bytes(views))
    assert {view: values.shape for view, values in back.items()} == {
        view: values.shape for view, values in views.items()
    }
    return {view: back[view] - values for view, values in views.items()}


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_a_set_moves_by_less_than_half_of_the_spread(factor: float) -> None:
    for error in errors({view: factor * values for view, values in alike().items()}).values():
        assert float(error.square().mean().sqrt()) < 0.45 * SPREAD * factor


def test_the_mean_of_the_sets_moves_by_less_than_a_fifth_of_the_spread() -> None:
    for error in errors(alike()).values():
        assert float(error.mean(dim=0).square().mean().sqrt()) < 0.21 * SPREAD


def test_sets_that_are_closer_are_written_more_finely() -> None:
    near = normal(64) + 0.05 * normal(4, 64, seed=1)
    assert float(errors({"adapted": near})["adapted"].square().mean().sqrt()) < 0.45 * 0.05


def test_a_set_that_is_alone_comes_back_to_a_fifteenth_of_its_typical_size() -> None:
    assert float(errors({"adapted": normal(1, 576)})["adapted"].abs().max()) < 1 / 15


def test_outliers_neither_set_the_step_nor_get_lost() -> None:
    values = alike()["adapted"]
    values[:, [3, 77]] += torch.tensor([400.0, -2500.0])
    assert float(errors({"adapted": values})["adapted"].square().mean().sqrt()) < 0.45 * SPREAD


def test_a_value_takes_less_than_three_bits() -> None:
    assert len(vectors_to_bytes(alike())) < 3 * 8 * 576 / 8


def test_a_view_costs_less_beside_one_that_is_like_it() -> None:
    views = alike()
    alone = sum(len(vectors_to_bytes({view: values})) for view, values in views.items())
    assert len(vectors_to_bytes(views)) < alone - 40


@given(st.integers(1, 5), st.lists(FLOATS, min_size=1, max_size=8), st.lists(FLOATS, min_size=8, max_size=8))
def test_any_finite_values_are_read_back_near_what_they_were(
    sets: int, values: list[float], shifts: list[float]
) -> None:
    adapted = torch.stack([torch.tensor(values) + shift * 2.0**-20 for shift in shifts[:sets]])
    views: dict[View, torch.Tensor] = {"context": torch.tensor([shifts]), "adapted": adapted}
    views["context"] = views["context"][:, : len(values)]
    for view, error in errors(views).items():
        assert float(error.abs().max()) <= 4 * float(views[view].abs().max()) + 1e-30


def test_zeros_come_back_as_zeros() -> None:
    zeros = torch.zeros(2, 5)
    assert torch.equal(vectors_from_bytes(vectors_to_bytes({"context": zeros}))["context"], zeros)


def test_views_may_have_different_numbers_of_sets() -> None:
    errors({"adapted": normal(3, 8), "context": normal(2, 8)})


def test_equal_vectors_have_equal_bytes_in_any_order() -> None:
    views = alike()
    assert vectors_to_bytes(views) == vectors_to_bytes(dict(reversed(alike().items())))


@pytest.mark.parametrize(
    "views",
    [
        {},
        {"adapted": torch.zeros(2)},
        {"adapted": torch.zeros(0, 2)},
        {"adapted": torch.zeros(256, 2)},
        {"adapted": torch.zeros(1, 2), "context": torch.zeros(1, 3)},
        {"adapted": torch.tensor([[1.0, torch.nan]])},
        {"adapted": torch.tensor([[torch.inf]])},
    ],
)
def test_what_is_not_rows_of_finite_values_is_not_written(views: dict[View, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="finite"):
        vectors_to_bytes(views)


@given(st.integers(0, 10**6))
def test_truncated_vectors_are_refused(cut: int) -> None:
    data = vectors_to_bytes(alike(2, 10))
    with pytest.raises(DataError, match="not task vectors"):
        vectors_from_bytes(data[: cut % len(data)])


@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_refused(place: int, bit: int) -> None:
    data = bytearray(vectors_to_bytes(alike(2, 10)))
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(DataError, match="not task vectors"):
        vectors_from_bytes(bytes(data))


def test_vectors_of_an_earlier_format_are_refused_and_not_called_damaged() -> None:
    with pytest.raises(OtherFormat, match=r"the file of task vectors was written by icm 0\.x"):
        vectors_from_bytes(add_checksum(b"ICMT\x01" + bytes(40)))


def test_a_view_is_the_same_whether_others_are_read_or_not() -> None:
    draw = torch.Generator().manual_seed(3)
    data = vectors_to_bytes(
        {"adapted": torch.randn(3, 20, generator=draw), "context": torch.randn(2, 20, generator=draw)}
    )
    both = arrays_from_bytes(data)
    assert list(both) == ["adapted", "context"]
    assert list(arrays_from_bytes(data, ["adapted"])) == ["adapted"]
    for view in both:
        assert np.array_equal(arrays_from_bytes(data, [view])[view], both[view])
