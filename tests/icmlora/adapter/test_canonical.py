"""The canonical form: the same dW, one representative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.metrics import squared_error
from icmlora.errors import AdapterRefused
from tests.icmlora.adapter_files import Q0, V0, adapter

SIZES = st.integers(1, 9)


def draw(seed: int, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


@given(seed=st.integers(0, 10**6), rank=SIZES, inputs=SIZES, outputs=SIZES, exponent=st.integers(-12, 12))
def test_dw_stays_the_same(seed: int, rank: int, inputs: int, outputs: int, exponent: int) -> None:
    a, b = draw(seed, rank, inputs, outputs)
    module = canonicalize(adapter((Q0, a, b * 10.0**exponent))).modules[0]
    wanted = b.double() * 10.0**exponent @ a.double()
    assert (module.a.shape, module.b.shape) == (a.shape, b.shape)
    assert torch.allclose(module.b.double() @ module.a.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4))
def test_every_gauge_has_the_same_canonical_form(seed: int, rank: int) -> None:
    a, b = draw(seed, rank, 9, 7)
    mixed, _ = torch.linalg.qr(draw(seed + 1, rank, rank, 1)[0].double())
    first = canonicalize(adapter((Q0, a, b))).modules[0]
    # A rotation with unequal scales: not orthogonal, well conditioned.
    gauge = mixed @ torch.diag(torch.linspace(0.5, 2.0, rank, dtype=torch.float64))
    other = canonicalize(adapter((Q0, (gauge @ a.double()).float(), (b.double() @ gauge.inverse()).float()))).modules[0]
    torch.testing.assert_close(first.b @ first.a, other.b @ other.a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.a.norm(dim=1), other.a.norm(dim=1), rtol=1e-4, atol=1e-4)


def test_the_factors_do_not_depend_on_the_gauge() -> None:
    a, b = draw(0, 3, 9, 7)
    gauge = torch.tensor([[2.0, 1.0, 0.0], [0.0, -1.0, 0.5], [0.0, 0.0, 4.0]])
    first = canonicalize(adapter((Q0, a, b))).modules[0]
    other = canonicalize(adapter((Q0, gauge @ a, b @ gauge.inverse()))).modules[0]
    torch.testing.assert_close(first.a, other.a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.b, other.b, rtol=1e-4, atol=1e-5)


def test_rank_slots_are_orthogonal_balanced_and_descend() -> None:
    module = canonicalize(adapter((Q0, *draw(0, 4, 9, 7)))).modules[0]
    values = module.a.norm(dim=1) ** 2
    assert bool((values[:-1] >= values[1:]).all())
    torch.testing.assert_close(module.a @ module.a.T, torch.diag(values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.b.T @ module.b, torch.diag(values), rtol=1e-5, atol=1e-5)


def test_the_largest_entry_of_each_row_of_a_is_positive() -> None:
    a = canonicalize(adapter((Q0, *draw(0, 4, 9, 7)))).modules[0].a
    assert bool((a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_the_canonical_form_of_a_canonical_form_is_itself() -> None:
    once = canonicalize(adapter((Q0, *draw(0, 4, 9, 7)), (V0, *draw(1, 2, 9, 7))))
    twice = canonicalize(once)
    assert squared_error(once, twice) < 1e-12
    for left, right in zip(once.modules, twice.modules, strict=True):
        torch.testing.assert_close(left.a, right.a)


def test_unused_slots_are_exactly_zero_and_last() -> None:
    a, b = draw(0, 4, 9, 7)
    a[2] = 2 * a[0]
    module = canonicalize(adapter((Q0, a, b))).modules[0]
    assert bool((module.a[3] == 0).all() and (module.b[:, 3] == 0).all())
    assert bool((module.a[:3].norm(dim=1) > 0.01).all())


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_an_untrained_adapter_becomes_zero_without_nan(zero: str) -> None:
    a, b = draw(0, 2, 9, 7)
    a, b = (a * 0 if zero != "b" else a), (b * 0 if zero != "a" else b)
    module = canonicalize(adapter((Q0, a, b))).modules[0]
    assert bool((module.a == 0).all() and (module.b == 0).all())


def test_modules_of_many_shapes_keep_their_names_and_shapes() -> None:
    mixed = adapter(
        ("model.layers.0.q", *draw(0, 2, 9, 7)),
        ("model.layers.10.q", *draw(1, 2, 9, 7)),
        ("model.layers.2.q", *draw(2, 2, 9, 7)),
        ("model.layers.0.k", *draw(3, 4, 9, 3)),
    )
    done = canonicalize(mixed)
    assert done.layout == mixed.layout
    assert squared_error(mixed, done) < 1e-12


def test_the_same_adapter_gives_the_same_bits_alone_and_in_a_batch() -> None:
    a, b = draw(0, 3, 9, 7)
    alone = canonicalize(adapter((Q0, a, b))).modules[0]
    batch = canonicalize(adapter((Q0, a, b), (V0, *draw(1, 3, 9, 7)))).modules[0]
    assert torch.equal(alone.a, batch.a)
    assert torch.equal(alone.b, batch.b)


def test_values_near_the_limit_of_float32_stay_finite() -> None:
    a, b = torch.full((2, 9), 1e38), torch.full((7, 2), 1e-38)
    done = canonicalize(adapter((Q0, a, b)))
    assert squared_error(adapter((Q0, a, b)), done) < 1e-12


def test_factors_beyond_float32_are_refused_by_name() -> None:
    wide, narrow = torch.full((7, 1), 3e38), torch.full((1, 1), 3e38)
    with pytest.raises(AdapterRefused, match="exceed float32") as caught:
        canonicalize(adapter((Q0, narrow, wide)))
    assert caught.value.kind == "overflow"
