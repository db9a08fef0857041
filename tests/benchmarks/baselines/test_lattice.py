"""The lattice E8: nearest points, their numbers, and codes of adapters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from icmlora.adapter.metrics import squared_error
from icmlora.errors import CodeError
from tests.benchmarks.baselines import e8
from tests.benchmarks.baselines.lattice import Lattice, from_bytes, to_bytes
from tests.icmlora.small_fleet import make_adapter, with_factors


def normal(count: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(count, e8.DIMENSION, generator=torch.Generator().manual_seed(seed))


def around(values: torch.Tensor) -> torch.Tensor:
    """Return every point of E8 of which each coordinate is within 1.5 of a vector's."""
    offsets = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=e8.DIMENSION)))
    near = torch.cat([values.round() + offsets, (values - 0.5).round() + 0.5 + offsets])
    return near[near.sum(dim=1) % 2 == 0]


@pytest.mark.parametrize("scale", [0.4, 3.0])
def test_no_point_is_nearer_than_the_nearest(scale: float) -> None:
    values = normal(20, scale)
    found = (values - e8.nearest(values)).square().sum(dim=1)
    best = torch.stack([(around(value) - value).square().sum(dim=1).min() for value in values])
    assert torch.allclose(found, best, atol=1e-5)


def test_points_are_their_own_nearest_even_on_a_coarse_grid() -> None:
    points = e8.nearest(normal(200, 2.0))
    assert torch.equal(e8.nearest(points), points)
    assert torch.equal(points.sum(dim=1) % 2, torch.zeros(200))


def test_shells_have_as_many_points_as_theory_says() -> None:
    divisors = [0, *(sum(d**3 for d in range(1, n + 1) if n % d == 0) for n in range(1, 9))]
    assert e8.shell_sizes(8).tolist() == [1, *(240 * total for total in divisors[1:])]


def test_every_number_of_a_shell_is_another_point_and_comes_back() -> None:
    shells = np.repeat(np.arange(4), e8.shell_sizes(3))
    numbers = np.concatenate([np.arange(size) for size in e8.shell_sizes(3)])
    points = e8.points(shells, numbers)
    assert len(np.unique(points, axis=0)) == len(points)
    assert np.array_equal(e8.shells(points), shells)
    assert np.array_equal(e8.numbers(points), numbers)


def test_numbers_of_far_points_come_back() -> None:
    points = np.asarray((2 * e8.nearest(normal(50, 20.0))).long().numpy())
    assert e8.shells(points).max() > 1000
    assert np.array_equal(e8.points(e8.shells(points), e8.numbers(points)), points)


@pytest.mark.parametrize(
    "lattice", [Lattice(2.0), Lattice(3.0, rank=2, full=True), Lattice(2.0, by_energy=True)], ids=str
)
def test_what_is_decoded_is_what_was_rounded(lattice: Lattice) -> None:
    rows = lattice.rows(make_adapter(0, rank=8))  # widths of 12 are not whole blocks
    decoded = from_bytes(to_bytes(rows))
    assert squared_error(rows.adapter(), decoded) < 1e-4  # scales are stored in bfloat16
    assert torch.equal(decoded.modules[0].a != 0, rows.adapter().modules[0].a != 0)


@pytest.mark.parametrize("bits", [3.0, 4.5, 7.0])
def test_a_code_has_the_bytes_that_were_asked_for(bits: float) -> None:
    adapter = make_adapter(0, rank=8)
    wanted = bits * sum(shape.parameters for shape in adapter.layout) / 8
    assert len(Lattice(bits).encode(adapter, b"")) == pytest.approx(wanted, abs=0.05 * wanted + 8)


def test_more_bits_are_less_error_and_bits_by_energy_are_worth_more() -> None:
    adapter = make_adapter(0, rank=8)

    def error(lattice: Lattice) -> float:
        return squared_error(adapter, lattice.decode(lattice.encode(adapter, b""), b""))

    assert error(Lattice(5.0)) < error(Lattice(3.0))
    assert error(Lattice(3.0, by_energy=True)) < error(Lattice(3.0))


def test_full_strength_is_the_length_of_the_original_along_it() -> None:
    adapter = make_adapter(0, rank=8)
    for module, original in zip(Lattice(3.0, full=True).rows(adapter).adapter().modules, adapter.modules, strict=True):
        mine, theirs = module.b @ module.a, original.b @ original.a
        assert float((mine * theirs).sum()) == pytest.approx(float(theirs.square().sum()), rel=1e-3)


def test_zeros_stay_zeros_at_any_number_of_bits() -> None:
    zeros = with_factors(make_adapter(0), a=0.0)
    for lattice in (Lattice(0.1), Lattice(9.0), Lattice(9.0, by_energy=True, full=True)):
        decoded = lattice.decode(lattice.encode(zeros, b""), b"")
        assert all(not (module.b @ module.a).any() for module in decoded.modules)


def test_a_cut_code_is_an_error() -> None:
    code = Lattice(3.0).encode(make_adapter(0), b"")
    with pytest.raises(CodeError):
        from_bytes(code[:-1])
