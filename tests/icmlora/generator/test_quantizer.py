"""Rounding of tokens: integers that every machine agrees on, and as little distortion as the step allows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.model import Adapter
from icmlora.generator.codec.quantizer import Norms, TokenQuantizer, centred, log2_norms, norm_of
from icmlora.generator.codec.runs import Nonzeros
from icmlora.generator.files.entropy_coding import LIMIT
from icmlora.generator.initial_a.subspace import InitialSubspace, initial_subspace
from icmlora.generator.network.cvae import CVAE, TaskState
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import KindTokens, Slots
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST, centres
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.small_fleet import codec, make_adapter, sides_of, with_factors


@pytest.fixture
def net() -> CVAE:
    return codec().net


def nothing_known(net: CVAE) -> InitialSubspace:
    return initial_subspace(None, net.config, net.sensitivity)


def state(net: CVAE) -> TaskState:
    return TaskState(torch.zeros(net.config.condition), torch.zeros(net.config.latent), nothing_known(net))


def first(net: CVAE, adapter: Adapter) -> tuple[KindTokens, Slots]:
    group = next(iter(tokenize(adapter, net.config, net.sensitivity)))
    return group, group.slots


@torch.no_grad()
def rounded(net: CVAE, adapter: Adapter, step: int) -> tuple[KindTokens, Slots, Norms, Nonzeros]:
    quantizer, (group, slots) = TokenQuantizer(net), first(net, adapter)
    norms = log2_norms(group.norm)
    return group, slots, norms, quantizer.quantise(group, norms, state(net), step)


@torch.no_grad()
def restored(net: CVAE, adapter: Adapter, step: int) -> tuple[KindTokens, KindTokens]:
    group, slots, norms, integers = rounded(net, adapter, step)
    vectors = TokenQuantizer(net).dequantise(slots, norms, state(net), step, integers)
    return group, KindTokens(group.kind, group.layer, group.slot, norm_of(norms), *vectors)


def products(group: KindTokens) -> torch.Tensor:
    return torch.einsum("ni,no,n->nio", group.inputs.double(), group.outputs.double(), 1 / group.norm.double())


def test_the_same_tokens_give_the_same_integers(net: CVAE) -> None:
    left, right = rounded(net, make_adapter(3), -40)[3], rounded(codec().net, make_adapter(3), -40)[3]
    assert left == right


def test_scales_do_not_depend_on_the_task_or_on_floats_of_the_network(net: CVAE) -> None:
    _, slots, norms, _ = rounded(net, make_adapter(3), -40)
    wanted = TokenQuantizer(net).scales(slots, norms, nothing_known(net), -40)
    with torch.no_grad():
        net.enter.weight += 1.0
    for scales, before in zip(TokenQuantizer(net).scales(slots, norms, nothing_known(net), -40), wanted, strict=True):
        np.testing.assert_array_equal(scales, before)


def test_a_finer_step_loses_less(net: CVAE) -> None:
    errors = []
    for step in (-24, -40, -56, -72):
        group, decoded = restored(net, make_adapter(3), step)
        errors.append(float((products(group) - products(decoded)).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


def test_the_sign_of_a_pair_does_not_matter(net: CVAE) -> None:
    quantizer, (group, _) = TokenQuantizer(net), first(net, make_adapter(3))
    flipped = KindTokens(group.kind, group.layer, group.slot, group.norm, -group.inputs, -group.outputs)
    norms = log2_norms(group.norm)
    with torch.no_grad():
        left, right = (quantizer.quantise(tokens, norms, state(net), -40) for tokens in (group, flipped))
    assert left == right


def test_norms_come_back_to_a_sixteenth_of_an_octave(net: CVAE) -> None:
    group, _, norms, _ = rounded(net, make_adapter(3), -40)
    assert np.abs(norms / OCTAVE - group.norm.log2().numpy()).max() <= 1 / 16 + 1e-6


def test_rounding_a_norm_does_not_change_dw(net: CVAE) -> None:
    # The factor moves all norms to where rounding them is worst.
    group, _, norms, _ = rounded(net, make_adapter(3), -40)
    shift = 2.0 ** float(norms[0] / OCTAVE - group.norm[0].log2() + 1 / 17)
    exact, decoded = restored(net, with_factors(make_adapter(3), b=shift), -88)
    lost = (products(decoded) - products(exact)).square().sum() / products(exact).square().sum()
    assert lost < 1e-4  # a sixteenth of an octave would be 2e-3


@pytest.mark.parametrize("exponent", [-30, 30])
def test_norms_far_from_the_fleets_come_back(net: CVAE, exponent: int) -> None:
    group, _, norms, _ = rounded(net, with_factors(make_adapter(3), b=10.0**exponent), -40)
    assert np.abs(norms / OCTAVE - group.norm.log2().numpy()).max() <= 1 / 16 + 1e-6


def test_integers_and_scales_stay_in_range_whatever_the_step(net: CVAE) -> None:
    for step in (-EXTREME, EXTREME):
        _, slots, norms, integers = rounded(net, make_adapter(3), step)
        scales = np.concatenate(
            [part.ravel() for part in TokenQuantizer(net).scales(slots, norms, nothing_known(net), step)]
        )
        assert np.abs(integers.values).max(initial=0) <= LIMIT
        assert SMALLEST <= scales.min() <= scales.max() <= LARGEST


@pytest.mark.parametrize("level", [-4000, SMALLEST, 0, LARGEST, 4000])
def test_a_scale_is_the_sum_of_its_parts_as_far_as_there_are_tables(net: CVAE, level: int) -> None:
    quantizer, (_, slots) = TokenQuantizer(net), first(net, make_adapter(3))
    size = quantizer.sizes[slots.kind][0]
    spread = np.rint(OCTAVE * net.spread.detach().numpy())[slots.kind, 0, slots.layer, slots.slot]
    profile = np.rint(OCTAVE * net.sensitivity.profile(slots.kind, 0).numpy())[slots.layer]
    plain = level + (spread - round(OCTAVE * np.log2(size) / 2))[:, None] + profile
    inputs, *_ = quantizer.scales(slots, np.full(len(slots.layer), level, dtype=np.int64), nothing_known(net), 0)
    np.testing.assert_array_equal(inputs, np.clip(plain, SMALLEST, LARGEST))


@torch.no_grad()
def with_initial(task: int, modules: int) -> tuple[TokenQuantizer, KindTokens, TaskState]:
    """Return the first tokens of an adapter of which the first modules' initial A is known, and its state."""
    under, initial = peft_codec(), peft_fleet().initial(task)
    assert initial is not None
    subspace = initial_subspace(replace(initial, modules=initial.modules[:modules]), under.config, under.sensitivity)
    tokens = tokenize(peft_fleet().load(task, None), under.config, under.sensitivity)
    plain = replace(state(under.net), subspace=subspace)
    shifts = under.quantizer.shifts(tokens, plain)
    return under.quantizer, tokens[0], replace(plain, subspace=replace(subspace, shifts=shifts))


@torch.no_grad()
def norms_of(quantizer: TokenQuantizer, group: KindTokens) -> tuple[Slots, Norms]:
    slots = group.slots
    return slots, log2_norms(group.norm)


@pytest.mark.parametrize("modules", [2, 4])
@pytest.mark.parametrize("step", [-90, -40, 0])
def test_runs_have_the_integers_and_scales_of_the_row_in_the_order_of_the_scales(modules: int, step: int) -> None:
    quantizer, group, known = with_initial(1, modules)
    slots, norms = norms_of(quantizer, group)
    with torch.no_grad():
        wanted = quantizer.quantise(group, norms, known, step)
    scales = quantizer.scales(slots, norms, known.subspace, step)
    runs = quantizer.runs(slots, norms, known.subspace, step)
    flat = np.concatenate([side.ravel() for side in scales])
    np.testing.assert_array_equal(wanted.scales, flat[wanted.places])
    assert runs.sizes == [(index, int((flat == index).sum())) for index in np.unique(flat).tolist()]
    found = runs.nonzeros(*runs.places([wanted], [len(norms)]))
    assert found == wanted
    np.testing.assert_array_equal(found.scales, flat[found.places])


@pytest.mark.parametrize("step", [-90, -40])
def test_integers_in_parts_have_the_places_that_they_have_together(step: int) -> None:
    quantizer, group, known = with_initial(1, 4)
    slots, norms = norms_of(quantizer, group)
    is_first = group.layer < 2
    with torch.no_grad():
        whole = quantizer.quantise(group, norms, known, step)
        parts = [quantizer.quantise(group[mask], norms[mask], known, step) for mask in (is_first, ~is_first)]
    assert (np.abs(whole.values).max() > 127) == (step == -90)
    runs = quantizer.runs(slots, norms, known.subspace, step)
    counts = [int(is_first.sum()), int((~is_first).sum())]
    for together, found in zip(runs.places([whole], [len(norms)]), runs.places(parts, counts), strict=True):
        np.testing.assert_array_equal(together, found)


@pytest.mark.parametrize("modules", [2, 4])
def test_shifts_are_those_of_modules_whose_initial_a_is_known(modules: int) -> None:
    quantizer, group, known = with_initial(0, modules)
    slots, norms = norms_of(quantizer, group)
    with_shifts = quantizer.scales(slots, norms, known.subspace, -40)[0]
    plain = quantizer.scales(slots, norms, replace(known.subspace, shifts=0 * known.subspace.shifts), -40)[0]
    places = known.subspace.knows(group.kind)[slots.layer]
    assert (with_shifts[places] < plain[places]).all()
    np.testing.assert_array_equal(with_shifts[~places], plain[~places])


def test_shifted_scales_are_the_size_of_what_is_left() -> None:
    quantizer, group, known = with_initial(0, 4)
    slots, norms = norms_of(quantizer, group)
    with torch.no_grad():
        rest = quantizer.in_steps(group, norms, known, -40)[0].square().mean(dim=1).numpy()
    scales = np.exp2(2 * quantizer.scales(slots, norms, known.subspace, -40)[0] / OCTAVE).mean(axis=1)
    for slot in range(8):
        assert np.log2(rest / scales)[slots.slot == slot].mean() == pytest.approx(0, abs=0.5)


def test_rows_that_a_module_lacks_hold_zeros_at_the_smallest_scale() -> None:
    quantizer, group, known = with_initial(1, 4)
    slots, norms = norms_of(quantizer, group)
    lacking = known.subspace.ranks_of(group.kind)[slots.layer, None] <= np.arange(8)
    assert lacking.any()
    with torch.no_grad():
        found = quantizer.quantise(group, norms, known, -60)
    sizes = (*quantizer.sizes[group.kind], known.subspace.rows(group.kind))
    *_, along = sides_of(found, len(norms), sizes)
    assert along.any()
    assert not along[lacking].any()
    *_, scales = quantizer.scales(slots, norms, known.subspace, -60)
    assert (scales[lacking] == SMALLEST).all()


def test_integers_and_scales_along_the_subspace_stay_in_range_whatever_the_step() -> None:
    quantizer, group, known = with_initial(0, 4)
    slots, norms = norms_of(quantizer, group)
    for step in (-EXTREME, EXTREME):
        with torch.no_grad():
            integers = quantizer.quantise(group, norms, known, step)
        scales = np.concatenate([side.ravel() for side in quantizer.scales(slots, norms, known.subspace, step)])
        assert np.abs(integers.values).max(initial=0) <= LIMIT
        assert SMALLEST <= scales.min() <= scales.max() <= LARGEST


@given(pairs=st.lists(st.tuples(st.integers(-LIMIT, LIMIT) | st.integers(-30, 30), st.integers(SMALLEST, LARGEST))))
def test_an_integer_lands_on_the_mean_of_its_bin_or_on_itself_beyond_its_table(pairs: list[tuple[int, int]]) -> None:
    whole, scale = (np.array([pair[side] for pair in pairs], dtype=np.int32) for side in (0, 1))
    plain = []
    for value, index in pairs:
        table = centres(index)
        plain.append(np.sign(value) * table[abs(value)] if abs(value) < len(table) else value)
    np.testing.assert_array_equal(centred(whole, scale), np.array(plain, dtype=np.float32))
