"""Where a fleet's unseen tasks start, and how long their steps are."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from icmlora.adapter.metrics import module_norms
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.fewshot.start import FIRST_RATES, FIRST_SLOPE, FewShotStart, encodable_part, untrained_fewshot_start
from icmlora.generator.config import config_for
from tests.icmlora.small_fleet import BASE, dense, make_adapter, module_name, with_factors

BOTH = make_adapter(0)
NAMES = [module.name for module in BOTH.modules]


def of_length(seed: int, length: float) -> Adapter:
    """Return an adapter whose modules all have |dW| = length."""
    adapter = make_adapter(seed)
    norms = module_norms(adapter)
    modules = tuple(LoraModule(m.name, m.a, length / norms[m.name] * m.b) for m in adapter.modules)
    return replace(adapter, modules=modules)


def start(sizes: tuple[int, ...] = (0, 8, -16, 4)) -> FewShotStart:
    rates = ((1, 2, 3, 4), (-8, -7, -6, -5))
    return FewShotStart(BOTH, sizes, rates, (2, -1), (8, -8), 3)


@pytest.mark.parametrize("samples", [1, 4, 16, 64])
def test_a_step_is_a_size_times_its_rate_and_what_samples_are_worth(samples: int) -> None:
    known = start()
    for step, slope in enumerate((2, -1)):
        for module in range(4):
            rate = known.rates[step][module] + slope * math.log2(samples / 16)
            wanted = 2 ** (known.sizes[module] / 8) * 2 ** (rate / 8)
            assert known.length(step, module, samples) == pytest.approx(wanted)


def test_a_step_in_context_is_longer_or_shorter_by_what_was_learned() -> None:
    known = start()
    for step, times in enumerate((2, 0.5)):
        assert known.length(step, 0, 4, in_context=True) == pytest.approx(times * known.length(step, 0, 4))


def test_it_is_the_mean_over_the_modules_that_most_adapters_have() -> None:
    fleet = [make_adapter(1), make_adapter(2), make_adapter(3, kinds=("q_proj", "down_proj"))]
    made = untrained_fewshot_start(fleet)
    assert {module.name for module in made.adapter.modules} == set(NAMES)
    found, parts = dense(made.adapter), [dense(adapter) for adapter in fleet]
    for name in NAMES:
        wanted = sum((part[name] for part in parts if name in part), torch.zeros(())) / 3
        assert torch.allclose(found[name], wanted, atol=1e-5)
    assert made.tasks == 3


def test_it_keeps_no_more_directions_than_asked_for() -> None:
    made = untrained_fewshot_start([make_adapter(1), make_adapter(2)], rank=1)
    assert {shape.rank for shape in made.adapter.layout} == {1}


def test_the_size_of_a_module_is_its_geometric_mean_over_the_fleet() -> None:
    made = untrained_fewshot_start([of_length(1, 1.0), of_length(2, 4.0)])
    assert made.sizes == (8,) * len(NAMES)  # an octave


def test_a_module_without_dw_takes_no_part_in_its_size() -> None:
    made = untrained_fewshot_start([of_length(1, 2.0), with_factors(make_adapter(2), b=0.0)])
    assert made.sizes == (8,) * len(NAMES)


def test_a_fleet_of_zeros_has_a_start() -> None:
    made = untrained_fewshot_start([with_factors(make_adapter(1), b=0.0)])
    assert made.sizes == (0,) * len(NAMES)


def test_nothing_is_learned_about_its_rates() -> None:
    made = untrained_fewshot_start([make_adapter(1)])
    assert made.rates == tuple((rate,) * len(NAMES) for rate in FIRST_RATES)
    assert made.slopes == (FIRST_SLOPE,) * len(FIRST_RATES)


def test_no_adapter_is_an_error() -> None:
    with pytest.raises(ValueError, match="no adapters"):
        untrained_fewshot_start([])


def test_adapters_are_read_one_after_the_other_and_not_kept() -> None:
    """The sum, the adapter that was added last, and the one that is read: three at most."""
    seen: list[weakref.ref[Adapter]] = []

    def read() -> Iterator[Adapter]:
        for seed in range(8):
            assert sum(reference() is not None for reference in seen) <= 2
            adapter = make_adapter(seed)
            seen.append(weakref.ref(adapter))
            yield adapter
            del adapter

    untrained_fewshot_start(read())
    assert len(seen) == 8


class TestWithin:
    """What a generator can encode of a start."""

    def test_it_is_all_of_it_where_the_generator_has_every_module(self) -> None:
        config = config_for(BASE, [BOTH.layout], tasks=2, condition_size=0, quality=4)
        kept = encodable_part(start(), config)
        assert (kept.sizes, kept.rates, kept.slopes, kept.tasks) == (start().sizes, start().rates, (2, -1), 3)
        assert torch.allclose(dense(kept.adapter)[NAMES[0]], dense(BOTH)[NAMES[0]], atol=1e-6)

    def test_modules_that_it_lacks_go_with_their_numbers(self) -> None:
        layout = make_adapter(0, kinds=("v_proj",)).layout
        kept = encodable_part(start(), config_for(BASE, [layout], tasks=2, condition_size=0, quality=4))
        places = [NAMES.index(module_name("v_proj", layer)) for layer in range(2)]
        assert [module.name for module in kept.adapter.modules] == [NAMES[place] for place in places]
        assert kept.adapter.target_modules == ("v_proj",)
        assert kept.sizes == tuple(start().sizes[place] for place in places)
        assert kept.rates == tuple(tuple(row[place] for place in places) for row in start().rates)

    def test_it_has_no_more_directions_than_the_generator_has_slots(self) -> None:
        layout = make_adapter(0, rank=1).layout
        kept = encodable_part(start(), config_for(BASE, [layout], tasks=2, condition_size=0, quality=4))
        assert {shape.rank for shape in kept.adapter.layout} == {1}

    def test_a_generator_of_other_modules_is_an_error(self) -> None:
        layout = make_adapter(0, kinds=("down_proj",)).layout
        with pytest.raises(ValueError, match="no module"):
            encodable_part(start(), config_for(BASE, [layout], tasks=2, condition_size=0, quality=4))
