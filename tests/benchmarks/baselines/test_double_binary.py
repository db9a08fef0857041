"""Signs and scales of channels."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from tests.benchmarks.baselines.catalogue import baseline_named
from tests.icmlora.small_fleet import dense, make_adapter, with_factors


def decoded(name: str, adapter: Adapter) -> Adapter:
    baseline = baseline_named(name)
    return baseline.decode(baseline.encode(adapter, b""), b"")


def error(name: str, adapter: Adapter) -> float:
    return squared_error(adapter, decoded(name, adapter))


def test_a_product_of_signs_and_scales_comes_back() -> None:
    adapter = make_adapter(0, rank=1)
    for module in adapter.modules:  # dW = diag(o) s t diag(i) with k = 1 is any matrix of rank 1
        assert module.shape.rank == 1
    assert error("lordba1", adapter) < 1e-4


def test_fitting_signs_and_scales_beats_the_signs_of_the_directions() -> None:
    adapter = make_adapter(0, rank=8)
    assert error("lordba8", adapter) < error("lordba8r", adapter) < error("svd8-1bit", adapter)


def test_factors_are_signs_where_only_rank_channels_have_scales() -> None:
    for module in decoded("lordba4r", make_adapter(0, rank=8)).modules:
        assert torch.allclose(module.a.abs(), module.a.abs()[:, :1].expand_as(module.a))
        assert torch.allclose(module.b.abs(), module.b.abs()[:1].expand_as(module.b))


def test_scales_of_channels_are_counted() -> None:
    adapter = make_adapter(0, rank=8)
    more = len(baseline_named("lordba4").encode(adapter, b"")) - len(baseline_named("lordba4r").encode(adapter, b""))
    assert more == 2 * sum(shape.inputs + shape.outputs for shape in adapter.layout)


def test_full_strength_keeps_the_length_along_the_original() -> None:
    adapter = make_adapter(0, rank=4)
    strong, original = dense(decoded("lordba4rf", adapter)), dense(adapter)
    for name, value in original.items():
        assert float((strong[name] * value).sum()) == pytest.approx(float(value.square().sum()), rel=0.02)


def test_zeros_stay_zeros() -> None:
    zeros = with_factors(make_adapter(0), a=0.0)
    assert all(not value.any() for name in ("lordba2", "lordba2rf") for value in dense(decoded(name, zeros)).values())
