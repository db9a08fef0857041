"""What each quantiser and baseline claims: its bytes, its largest error, and what its bytes depend on."""

from __future__ import annotations

import re
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmlora.adapter.metrics import squared_error
from icmlora.baselines.catalogue import baseline_named
from icmlora.baselines.head import Head
from icmlora.baselines.quantizers import _NF4, Bf16, Int8, Nf4, Uniform, ValueQuantizer, pack, packed_size, unpack
from icmlora.errors import UnknownBaseline
from tests.icmlora.small_fleet import make_adapter, same, with_factors

QUANTIZERS = [
    Bf16(),
    Int8(),
    Nf4(),
    *(Uniform(bits) for bits in (1, 2, 3, 4)),
    Uniform(3, 5),
    Uniform(2, full=True),
]
SIZES = st.integers(1, 40)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Draw a matrix of any shape, whose rows differ in size."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    rows, columns = draw(st.integers(1, 6)), draw(SIZES)
    sizes = 2.0 ** torch.randint(-8, 8, (rows, 1), generator=random)
    return sizes * torch.randn(rows, columns, generator=random)


def there_and_back(quantizer: ValueQuantizer, values: torch.Tensor) -> torch.Tensor:
    return quantizer.decode(quantizer.encode(values), *values.shape)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@given(values=matrices())
@settings(max_examples=12)
def test_a_matrix_takes_the_bytes_that_its_shape_says(quantizer: ValueQuantizer, values: torch.Tensor) -> None:
    assert len(quantizer.encode(values)) == quantizer.size(*values.shape)
    assert there_and_back(quantizer, values).shape == values.shape


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@given(values=matrices(), exponent=st.integers(-10, 10))
@settings(max_examples=12)
def test_a_power_of_two_only_changes_the_scales(quantizer: ValueQuantizer, values: torch.Tensor, exponent: int) -> None:
    factor = 2.0**exponent
    assert torch.equal(there_and_back(quantizer, factor * values), factor * there_and_back(quantizer, values))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@given(values=matrices())
@settings(max_examples=12)
def test_no_error_is_larger_than_the_values_themselves(quantizer: ValueQuantizer, values: torch.Tensor) -> None:
    limit = 1.0 if not getattr(quantizer, "full", False) else 4.0
    lost = (values - there_and_back(quantizer, values)).square().sum()
    assert float(lost) <= limit * 1.01 * float(values.square().sum())


@given(values=matrices())
@settings(max_examples=40)
def test_bfloat16_keeps_eight_bits_of_every_value(values: torch.Tensor) -> None:
    assert bool(((there_and_back(Bf16(), values) - values).abs() <= 2.0**-8 * values.abs()).all())


@given(values=matrices())
@settings(max_examples=40)
def test_int8_is_within_half_a_step_of_every_value(values: torch.Tensor) -> None:
    # The scale itself is rounded to bfloat16, so the largest value may be clipped by 2^-8 of it.
    step = values.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((there_and_back(Int8(), values) - values).abs() <= step * (0.5 + 127 * 2.0**-8) * 1.01).all())


@given(values=matrices())
@settings(max_examples=40)
def test_int8_of_the_opposite_is_the_opposite(values: torch.Tensor) -> None:
    assert torch.equal(there_and_back(Int8(), -values), -there_and_back(Int8(), values))


@given(values=matrices())
@settings(max_examples=40)
def test_nf4_is_within_half_of_its_widest_gap(values: torch.Tensor) -> None:
    gap = float((_NF4[1:] - _NF4[:-1]).max()) / 2
    flat, back = values.reshape(-1), there_and_back(Nf4(), values).reshape(-1)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        limit = float(block.abs().max()) * (gap + 2.0**-8) * 1.01
        assert bool(((back[start : start + 64] - block).abs() <= limit).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@given(values=matrices())
@settings(max_examples=12)
def test_a_row_has_no_more_levels_than_its_bits_allow(bits: int, values: torch.Tensor) -> None:
    for row in there_and_back(Uniform(bits), values):
        assert len(row.unique()) <= 2**bits


@given(values=matrices())
@settings(max_examples=40)
def test_one_bit_keeps_the_sign_of_every_value(values: torch.Tensor) -> None:
    back = there_and_back(Uniform(1), values)
    assert bool((back * values >= 0).all())


@given(values=matrices())
@settings(max_examples=40)
def test_full_strength_keeps_the_length_along_the_original(values: torch.Tensor) -> None:
    back = there_and_back(Uniform(3, full=True), values)
    kept = (back * values).sum(dim=1) / values.square().sum(dim=1)
    torch.testing.assert_close(kept, torch.ones_like(kept), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@given(data=st.data())
@settings(max_examples=30)
def test_packed_integers_come_back_without_a_gap(bits: int, data: st.DataObject) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=np.uint8)
    packed = pack(values, bits)
    assert len(packed) == packed_size(len(values), bits)
    assert unpack(packed, bits, len(values)).tolist() == values.tolist()
    assert int.from_bytes(packed, "little") == sum(int(value) << bits * place for place, value in enumerate(values))


@pytest.mark.parametrize(("name", "bits"), [("bf16", 16.0), ("4bit", 4.0), ("3bit", 3.0), ("2bit", 2.0), ("1bit", 1.0)])
def test_a_code_takes_its_head_its_values_and_its_scales(name: str, bits: float) -> None:
    adapter = make_adapter(0, rank=4)
    rows = sum(2 * shape.rank for shape in adapter.layout)
    scales = 0 if name == "bf16" else 2 * rows
    values = sum(packed_size(shape.rank * width, int(bits)) for shape in adapter.layout for width in shape[2:])
    head = len(Head.of(adapter).to_bytes())
    assert len(baseline_named(name).encode(adapter, b"")) == head + values + scales


@pytest.mark.parametrize("name", ["svd2", "svd2-int8", "loraquant2", "mean2+svd1", "jd2"])
def test_labels_and_revision_come_back(name: str) -> None:
    adapter, baseline = make_adapter(0), baseline_named(name)
    shared = baseline.prepare({"a": adapter})
    decoded = baseline.decode(baseline.encode(adapter, shared), shared)
    assert (decoded.base_model, decoded.task_type, decoded.revision) == (adapter.base_model, "CAUSAL_LM", None)
    assert decoded.target_modules == adapter.target_modules


@pytest.mark.parametrize("name", ["svd2", "svd1-4bit", "loraquant3-80"])
def test_what_acts_on_balanced_factors_does_not_see_the_gauge(name: str) -> None:
    adapter, baseline = make_adapter(0), baseline_named(name)
    other = with_factors(adapter, a=8.0, b=0.125)
    assert same(baseline.decode(baseline.encode(adapter, b""), b""), baseline.decode(baseline.encode(other, b""), b""))


@pytest.mark.parametrize("name", ["bf16", "svd2", "loraquant2", "mean2+svd1", "jd2", "jd2diag"])
def test_the_code_of_a_task_depends_on_the_shared_bytes_alone(name: str) -> None:
    baseline, adapter = baseline_named(name), make_adapter(7)
    shared = baseline.prepare({"a": make_adapter(0), "b": make_adapter(1)})
    alone = baseline.encode(adapter, shared)
    baseline.encode(make_adapter(8), shared)
    assert baseline.encode(adapter, shared) == alone


@pytest.mark.parametrize("name", ["mean2", "mean2+svd1", "jd2"])
def test_more_tasks_do_not_make_the_shared_bytes_longer(name: str) -> None:
    baseline = baseline_named(name)
    sizes = [len(baseline.prepare({str(seed): make_adapter(seed) for seed in range(count)})) for count in (1, 2, 6)]
    assert max(sizes) - min(sizes) <= 8  # the deflated head may differ by a few bytes


def test_the_basis_of_a_single_task_holds_it_whole() -> None:
    baseline, adapter = baseline_named("jd2"), make_adapter(0, rank=2)
    shared = baseline.prepare({"a": adapter})
    assert squared_error(adapter, baseline.decode(baseline.encode(adapter, shared), shared)) < 1e-3


def test_more_clusters_than_tasks_are_as_many_as_the_tasks() -> None:
    fleet = {"a": make_adapter(0), "b": make_adapter(1, own=9.0)}
    assert baseline_named("jd2x9").prepare(fleet)[0] == 2


QUANTISER_NAMES = st.sampled_from(["bf16", "int8", "nf4", "1bit", "4bitf", "3bitg64", "2bitg8f"])


@given(rank=st.integers(1, 9999), quantizer=QUANTISER_NAMES)
def test_every_name_of_a_family_is_a_baseline_of_that_rank(rank: int, quantizer: str) -> None:
    for name in (f"svd{rank}-{quantizer}", f"mean{rank}-{quantizer}", f"jd{rank}-{quantizer}"):
        assert baseline_named(name).rank == rank  # type: ignore[attr-defined]
        assert baseline_named(name) == baseline_named(name)


@given(st.text(alphabet="svdmeanjdx0123456789bitfg+-qulor", max_size=14))
@settings(max_examples=200)
def test_any_text_is_a_baseline_or_refused_by_name(name: str) -> None:
    if re.match("(svd|mean|jd|loraquant)|(bf16|int8|nf4|[1-4]bit)", name):
        with suppress(UnknownBaseline):
            baseline_named(name)
    else:
        with pytest.raises(UnknownBaseline) as caught:
            baseline_named(name)
        assert repr(name) in caught.value.message
