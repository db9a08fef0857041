"""The loss: bits that the codec really takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.initial_a.subspace import InitialSubspace, initial_subspace
from icmlora.generator.network.batch import batched, prepare
from icmlora.generator.network.cvae import CVAE
from icmlora.generator.network.objective import Bits, Objective, worth_writing
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import KindTokens
from icmlora.generator.network.water_filling import WaterFilling
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.small_fleet import (
    BASE,
    MemoryAdapterSource,
    begin,
    codec,
    make_adapter,
    make_vectors,
    mixed_fleet,
    uneven,
    with_factors,
)

CONFIG = mixed_fleet().config()
WEIGHTS = uneven(CONFIG)
NOTHING = initial_subspace(None, CONFIG, WEIGHTS)


def bits_of(
    net: CVAE, tokens: tuple[KindTokens, ...], vectors: Mapping[str, torch.Tensor], subspace: InitialSubspace
) -> Bits:
    adapter = prepare(tokens, subspace, net.sensitivity, net.config.tolerance)
    return Objective(net).bits(batched(net.config, [adapter], [vectors], [noise()]))


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.one_case
@pytest.mark.parametrize("modules", [0, 3, 6])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_estimate_is_near_the_size_of_the_code_whatever_is_known_of_the_initial_a(task: int, modules: int) -> None:
    under, adapter, initial = peft_codec(), peft_fleet().load(task, None), peft_fleet().initial(task)
    assert initial is not None
    known = replace(initial, modules=initial.modules[:modules]) if modules else None
    tokens = tokenize(adapter, under.config, under.sensitivity)
    with torch.no_grad():
        subspace = initial_subspace(known, under.config, under.sensitivity)
        bits = bits_of(under.net, tokens, {}, subspace)
    stored = 8 * len(encode_adapter(under, adapter, {}, known).data)
    assert stored == pytest.approx(float(bits.norms + bits.tokens) + 8 * 120, rel=0.15)


@pytest.mark.parametrize("modules", [0, 2])
def test_wrong_spreads_cost_bits_in_modules_of_which_nothing_is_known(modules: int) -> None:
    adapter, initial = peft_fleet().load(0, None), peft_fleet().initial(0)
    assert initial is not None
    known = replace(initial, modules=initial.modules[:modules]) if modules else None
    bits = []
    for octaves in (0, 3):
        net = peft_codec().net
        with torch.no_grad():
            net.spread[:, 0] += octaves
            tokens = tokenize(adapter, net.config, net.sensitivity)
            subspace = initial_subspace(known, net.config, net.sensitivity)
            bits.append(float(bits_of(net, tokens, {}, subspace).tokens))
    assert bits[1] > 1.2 * bits[0]


def test_energy_along_the_subspace_is_not_what_the_step_has_to_share_out() -> None:
    under, initial = peft_codec(), peft_fleet().initial(0)
    tokens = tokenize(peft_fleet().load(0, None), under.config, under.sensitivity)
    steps = [
        WaterFilling(tokens, under.sensitivity, initial_subspace(which, under.config, under.sensitivity)).step(0.1)
        for which in (None, initial)
    ]
    assert steps[0] < steps[1]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_estimate_is_near_the_size_of_the_code(task: int) -> None:
    under, adapter = codec(), mixed_fleet().load(task, None)
    with torch.no_grad():
        bits = bits_of(
            under.net,
            tokenize(adapter, under.config, under.net.sensitivity),
            make_vectors(task),
            NOTHING,
        )
    stored = 8 * len(encode_adapter(under, adapter, make_vectors(task)).data)
    overhead = 8 * 110  # magic, digest and head, which the objective counts in part
    assert float(bits.norms + bits.tokens) < stored < 1.3 * float(bits.norms + bits.tokens) + overhead


def test_a_smaller_tolerance_needs_a_finer_step() -> None:
    tokens = tokenize(make_adapter(0), CONFIG, WEIGHTS)
    steps = [WaterFilling(tokens, WEIGHTS, NOTHING).step(tolerance) for tolerance in (0.5, 0.1, 0.01)]
    assert steps == sorted(steps, reverse=True)


def test_the_step_scales_with_the_adapter() -> None:
    left, right = (tokenize(with_factors(make_adapter(0), b=b), CONFIG, WEIGHTS) for b in (1.0, 8.0))
    assert WaterFilling(right, WEIGHTS, NOTHING).step(0.1) == pytest.approx(
        8 * WaterFilling(left, WEIGHTS, NOTHING).step(0.1), rel=1e-4
    )


@torch.no_grad()
def test_an_adapter_of_zeros_costs_its_latent_and_nothing_else() -> None:
    net = codec().net
    zeros = tokenize(with_factors(make_adapter(0), b=0.0), net.config, net.sensitivity)
    bits = bits_of(net, zeros, {}, NOTHING)
    assert (float(bits.norms), float(bits.tokens), float(bits.prior)) == (0.0, 0.0, 0.0)
    assert torch.isfinite(bits.total)


def test_every_part_of_the_network_that_a_step_uses_gets_a_gradient() -> None:
    net = codec().net.train()
    tokens = [tokenize(mixed_fleet().load(task, None), net.config, net.sensitivity) for task in range(3)]
    sum(bits_of(net, group, make_vectors(0), NOTHING).total for group in tokens).backward()  # type: ignore[union-attr]
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert without == {"condition.missing"}  # both views are there


def test_a_slot_is_written_where_it_has_integers_or_is_predicted_well() -> None:
    (group, *_) = tokenize(make_adapter(0, rank=4), CONFIG, WEIGHTS)
    no, yes = torch.zeros(len(group.norm), dtype=torch.bool), torch.ones(len(group.norm), dtype=torch.bool)
    nothing = replace(group, inputs=0 * group.inputs, outputs=0 * group.outputs)
    assert worth_writing(group, nothing, yes, yes).all()
    assert not worth_writing(group, nothing, no, yes).any()
    assert worth_writing(group, group, no, no).all()


def two_kinds_of_one_width() -> Adapter:
    modules = make_adapter(0, rank=3).modules
    square = [module for module in modules if module.name.endswith("q_proj")]
    other = [LoraModule(module.name.replace("q_proj", "o_proj"), module.a[:2], module.b[:, :2]) for module in square]
    modules = (*modules, *other)
    return Adapter(BASE, "CAUSAL_LM", target_modules(module.name for module in modules), modules)


def test_adapters_take_the_same_bits_together_as_one_by_one() -> None:
    fleet = MemoryAdapterSource([[two_kinds_of_one_width()], [make_adapter(1, rank=2)], [make_adapter(2, rank=3)]])
    # One has both views, one has none, one has a view.
    vectors = [make_vectors(0), {}, {"context": make_vectors(2)["context"]}]
    net = begin(fleet, 1).net
    nothing = initial_subspace(None, net.config, net.sensitivity)
    adapters = [
        prepare(tokenize(fleet.load(task, None), net.config, net.sensitivity), nothing, net.sensitivity, 0.1)
        for task in range(3)
    ]
    found = []
    for stacks in ([[0, 1, 2]], [[0], [1], [2]]):
        net.zero_grad()
        batches = [
            batched(net.config, [adapters[i] for i in stack], [vectors[i] for i in stack], [noise() for _ in stack])
            for stack in stacks
        ]
        bits = torch.cat([Objective(net).bits(batch).total for batch in batches])
        bits.sum().backward()
        found.append([bits.detach(), *(value.grad for value in net.parameters() if value.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_adapters_of_which_different_initial_as_are_known_take_the_same_bits_together_as_one_by_one() -> None:
    fleet, net = peft_fleet(), peft_codec().net
    initials = [fleet.initial(0), None, fleet.initial(2)]
    assert initials[0] is not None
    initials[0] = replace(initials[0], modules=initials[0].modules[:3])
    adapters = [
        prepare(
            tokenize(fleet.load(task, None), net.config, net.sensitivity),
            initial_subspace(initial, net.config, net.sensitivity),
            net.sensitivity,
            net.config.tolerance,
        )
        for task, initial in enumerate(initials)
    ]
    with torch.no_grad():
        together = Objective(net).bits(batched(net.config, adapters, [{}] * 3, [noise() for _ in adapters]))
        alone = [Objective(net).bits(batched(net.config, [one], [{}], [noise()])) for one in adapters]
    for part, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(parts), rtol=1e-5, atol=1e-3)
