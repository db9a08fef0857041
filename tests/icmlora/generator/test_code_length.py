"""Code lengths: as long as the coder's tables say, with the gradients of the formula."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as arrays

from icmlora.generator.network.code_length import bin_bits
from icmlora.generator.scales import GAUSSIAN_SHARE, SMALLEST_SCALE, WIDE, probabilities, reach_of

values_of = arrays.arrays(np.float32, st.integers(1, 40), elements=st.floats(-40, 40, width=32))


def formula(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition, for autograd in float64."""
    kept, magnitude = scale.clamp_min(SMALLEST_SCALE), values.abs()

    def mass(width: torch.Tensor) -> torch.Tensor:
        near: torch.Tensor = torch.special.ndtr((0.5 - magnitude) / width)
        far: torch.Tensor = torch.special.ndtr((-0.5 - magnitude) / width)
        return near - far

    both = GAUSSIAN_SHARE * mass(kept) + (1 - GAUSSIAN_SHARE) * mass(WIDE * kept)
    return -torch.log2(both.clamp_min(1e-12))


def test_the_bits_of_an_integer_are_those_of_the_coders_table() -> None:
    for index in (-8, 0, 13):
        magnitude = torch.arange(0.0, reach_of(index))  # the last symbol stands for all that are larger
        table = torch.tensor(probabilities(index)[reach_of(index) : -1], dtype=torch.float32)
        scale = torch.full_like(magnitude, 2.0 ** (index / 8))
        torch.testing.assert_close(bin_bits(magnitude, scale), -table.log2(), rtol=0, atol=0.05)


def test_bits_and_their_gradients_stay_finite_far_from_zero() -> None:
    values = torch.tensor([0.0, 1e3, 1e6], requires_grad=True)
    bits = bin_bits(values, torch.full((3,), 1e-6)).sum()
    (gradient,) = torch.autograd.grad(bits, values)
    assert torch.isfinite(bits)
    assert torch.isfinite(gradient).all()


@given(values_of, st.floats(-3, 6))
def test_bits_and_gradients_are_those_of_the_formula(drawn: np.ndarray, octaves: float) -> None:
    found, wanted = [], []
    for function, dtype, into in ((bin_bits, torch.float32, found), (formula, torch.float64, wanted)):
        values = torch.from_numpy(drawn).to(dtype).requires_grad_()
        scale = torch.full_like(values, 2.0**octaves).detach().requires_grad_()
        bits = function(values, scale)
        # Where the probability is too small to be told from zero, the formula has no gradient.
        (bits * (bits < 39)).sum().backward()
        assert values.grad is not None
        assert scale.grad is not None
        into += [bits.detach(), values.grad, scale.grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-3, atol=1e-3)


def test_many_values_are_computed_as_one_by_one() -> None:
    torch.manual_seed(0)
    values, scale = torch.randn(3, 50_000), torch.rand(3, 50_000) + 0.1
    chosen = values[:, ::9999]
    torch.testing.assert_close(bin_bits(values, scale)[:, ::9999], bin_bits(chosen, scale[:, ::9999]))


def test_only_the_gradients_that_are_asked_for_are_made() -> None:
    values, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0], requires_grad=True)
    bin_bits(values, scale).sum().backward()
    assert values.grad is None
    assert scale.grad is not None
    assert not bin_bits(values, scale.detach()).requires_grad
