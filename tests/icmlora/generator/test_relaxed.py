"""A code that a gradient can move: it starts as the code that it is, and ends as a code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.codec.codec import Codec, OpenCode
from icmlora.generator.codec.encoding import encode_adapter, measured
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.packing import KindIntegers
from icmlora.generator.codec.quantizer import centred
from icmlora.generator.codec.relaxed import RelaxedCode
from icmlora.generator.files.entropy_coding import Integers
from icmlora.generator.scales import LARGEST, SMALLEST
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.small_fleet import codec, make_vectors, mixed_fleet, sides_of

TASKS = [0, 1, 2]
Make = Callable[[int], tuple[Codec, Adapter, bytes, RelaxedCode]]


def known(task: int, tolerance: float = 0.1) -> tuple[Codec, Adapter, bytes, RelaxedCode]:
    """Return the code of an adapter whose initial A is known."""
    under, adapter = peft_codec(), peft_fleet().load(task, None)
    data = encode_adapter(under, adapter, {}, peft_fleet().initial(task), limits=Limits(tolerance=tolerance)).data
    return under, adapter, data, RelaxedCode(under, adapter, data)


def relaxed(task: int, tolerance: float = 0.1) -> tuple[Codec, Adapter, bytes, RelaxedCode]:
    under, adapter = codec(), mixed_fleet().load(task, None)
    data = encode_adapter(under, adapter, make_vectors(task), limits=Limits(tolerance=tolerance)).data
    return under, adapter, data, RelaxedCode(under, adapter, data)


@pytest.mark.parametrize("make", [relaxed, known])
@pytest.mark.parametrize("task", TASKS)
def test_what_nobody_moved_is_the_same_code(make: Make, task: int) -> None:
    _, _, data, code = make(task)
    assert code.to_code() == data


@pytest.mark.parametrize("make", [relaxed, known])
@pytest.mark.parametrize("task", TASKS)
def test_its_factors_are_those_of_the_decoded_adapter(make: Make, task: int) -> None:
    under, _, data, code = make(task)
    factors = code.factors()
    for module in under.decode(data).modules:
        if float(module.b.abs().max()) > 0:
            a, b = factors[module.name]
            torch.testing.assert_close(b @ a, module.b @ module.a, rtol=1e-4, atol=1e-6)


def test_every_integer_becomes_the_centre_that_the_codec_gives_it() -> None:
    _, _, _, code = relaxed(0)
    scales = np.arange(SMALLEST, LARGEST + 1).astype(np.int8)[:, None].repeat(400, axis=1)
    whole = np.arange(-200, 200).astype(np.int32)[None, :].repeat(len(scales), axis=0)
    found = code._centred(torch.from_numpy(whole).float(), torch.from_numpy(scales))
    assert np.array_equal(found.numpy().ravel(), centred(whole.ravel(), scales.ravel()))


@pytest.mark.parametrize("make", [relaxed, known])
def test_moved_values_are_what_the_new_code_decodes_to(make: Make) -> None:
    under, adapter, data, code = make(1)
    with torch.no_grad():
        for values in code.values:
            values += 1.0
        for strength in code.strengths:
            strength += 0.5
    decoded = {module.name: module for module in under.decode(code.to_code()).modules}
    assert measured(under, adapter, code.to_code()).squared_error > measured(under, adapter, data).squared_error
    for name, (a, b) in code.factors().items():
        # A strength is stored in sixty-fourths of an octave.
        torch.testing.assert_close(decoded[name].b @ decoded[name].a, b @ a, rtol=0.02, atol=1e-3)


def along(under: Codec, opened: OpenCode, group: KindIntegers) -> Integers:
    """Return the integers along the initial subspace, shape (n, R)."""
    kind = group.slots.kind
    sizes = (*under.quantizer.sizes[kind], opened.state.subspace.rows(kind))
    return sides_of(group.vectors, len(group.slots.layer), sizes)[2]


def test_a_code_that_was_moved_still_holds_the_initial_a() -> None:
    under, _, data, code = known(0)
    before = under.open(data)
    with torch.no_grad():
        for values in code.values:
            values += 1.0
    after = under.open(code.to_code())
    assert after.head.initial == before.head.initial
    assert np.array_equal(after.head.shifts, before.head.shifts)
    for group, other in zip(before.groups, after.groups, strict=True):
        rows = [along(under, opened, found) for opened, found in ((before, group), (after, other))]
        assert np.array_equal(rows[1][:, :6], rows[0][:, :6] + 1)


def test_values_and_strengths_get_gradients() -> None:
    *_, code = known(0)
    total = sum((b @ a).square().sum() for a, b in code.factors().values()) + code.bits()
    assert isinstance(total, torch.Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    for parameter in (*code.values, *code.strengths):
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) > 0


def test_the_bits_are_near_those_of_the_code() -> None:
    *_, data, code = relaxed(1, tolerance=0.01)
    assert float(code.bits().detach()) == pytest.approx(8 * (len(data) - 110), rel=0.3)


def test_smaller_values_cost_fewer_bits() -> None:
    *_, code = relaxed(1)
    before = float(code.bits().detach())
    with torch.no_grad():
        for values in code.values:
            values *= 0.5
    assert float(code.bits().detach()) < before


def test_boosts_make_longer_what_lies_across_the_subspace_and_nothing_else() -> None:
    under, _, data, code = known(0)
    before = under.open(data)
    with torch.no_grad():
        for boost in code.strengths[1::2]:
            boost += 1.0
    after = under.open(code.to_code())
    for group in after.groups:
        layer = torch.from_numpy(group.slots.layer)
        norms = group.norms
        plain, longer = (
            under.quantizer.dequantise(group.slots, norms, opened.state, opened.head.step, group.vectors)
            for opened in (before, after)
        )
        subspace, kind = after.state.subspace, group.slots.kind
        difference = longer[0] - plain[0]
        known_here = torch.from_numpy(subspace.knows(kind))[layer]
        assert difference[known_here].any()
        assert not difference[~known_here].any()
        # Rounding leaves a little of it along the subspace, which is made longer with it.
        assert subspace.project(kind, layer, difference).norm() < 0.3 * difference.norm()
        assert torch.equal(longer[1], plain[1])


def test_a_code_without_integers_can_be_opened_and_closed() -> None:
    under, adapter = codec(), mixed_fleet().load(0, None)
    data = encode_adapter(under, adapter, make_vectors(0), limits=Limits(tolerance=0.999)).data
    opened = RelaxedCode(under, adapter, data)
    opened.factors()
    assert float(opened.bits().detach()) >= 0
    assert opened.to_code() == data


def test_a_code_takes_no_values_of_a_code_with_other_slots() -> None:
    under, adapter = codec(), mixed_fleet().load(0, None)

    def of_layer(layer: int) -> RelaxedCode:
        modules = [module if f".{layer}." in module.name else bare(module) for module in adapter.modules]
        only = replace(adapter, modules=tuple(modules))
        return RelaxedCode(under, only, encode_adapter(under, only, make_vectors(0), limits=Limits(tolerance=0.1)).data)

    def bare(module: LoraModule) -> LoraModule:
        return replace(module, b=torch.zeros_like(module.b))

    code = of_layer(0)
    before = [values.clone() for values in code.values]
    code.continue_from(of_layer(1), reset_zeros=False)
    assert all(map(torch.equal, before, code.values))


@pytest.mark.parametrize("anew", [True, False])
def test_a_code_takes_what_another_step_has_fitted_but_if_anew_not_what_that_rounds_to_zero(*, anew: bool) -> None:
    under, adapter = codec(), mixed_fleet().load(0, None)
    coarse, fine, untouched = (
        RelaxedCode(
            under, adapter, encode_adapter(under, adapter, make_vectors(0), limits=Limits(tolerance=tolerance)).data
        )
        for tolerance in (0.3, 0.1, 0.1)
    )
    with torch.no_grad():
        for values in coarse.values:
            values.copy_(torch.where(values.round() == 0, 0.4, values))
    fine.continue_from(coarse, reset_zeros=anew)
    ratio, compared = 2.0 ** ((coarse.step - fine.step) / 8), 0
    assert ratio > 1
    for values, before, earlier in zip(fine.values, untouched.values, coarse.values, strict=True):
        if values.shape == earlier.shape:
            stays = (earlier.round() == 0) & anew
            assert torch.allclose(values, torch.where(stays, before, earlier * ratio))
            compared += values.numel()
    assert compared > 0
