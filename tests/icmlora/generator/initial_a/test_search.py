"""Finding the seed that an adapter's training began with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.generator.initial_a.search import SEEDS, SeedSearch
from tests.icmlora.peft_made import SEED, peft_made, seeds

ADAPTER = peft_made().adapter


def changed(adapter: Adapter, change: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    """Return an adapter with another A in every module."""
    modules = tuple(LoraModule(module.name, change(module.a), module.b) for module in adapter.modules)
    return replace(adapter, modules=modules)


def noise(a: torch.Tensor) -> torch.Tensor:
    """Return an A of no seed that is tried."""
    return torch.empty_like(a).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(10**12 + 5))


@pytest.mark.parametrize("seed", [0, 1, 42, 99])
@pytest.mark.parametrize("task", [0, 1])
def test_the_seed_is_found_though_training_moved_a_by_half_its_length(seed: int, task: int) -> None:
    made = peft_made(seed, moved=0.5, task=task)
    found = seeds().find(made.adapter)
    assert found is not None
    assert found.seed == seed
    assert {module.shape for module in found.modules} == set(made.adapter.layout)


@pytest.mark.one_case
@pytest.mark.parametrize("seed", [42, 3407, 9999, 123456])
def test_the_seeds_that_people_take_are_tried(seed: int) -> None:
    assert seed in SEEDS
    found = SeedSearch().find(peft_made(seed).adapter)
    assert found is not None
    assert found.seed == seed


def test_a_seed_that_is_not_tried_is_not_found() -> None:
    assert SeedSearch(range(SEED)).find(ADAPTER) is None
    assert SeedSearch(range(SEED + 1)).find(ADAPTER) is not None


def test_modules_are_found_in_the_order_in_which_peft_made_them() -> None:
    made = peft_made(SEED, ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"))
    found = seeds().find(made.adapter)
    assert found is not None
    assert [module.shape.module for module in found.modules] == list(made.drawn)
    assert list(made.drawn) != [module.name for module in made.adapter.modules]


def test_other_adapters_of_the_same_seed_are_found_by_the_same_search() -> None:
    search = seeds()
    others = [peft_made(task=1), peft_made(targets=("down_proj", "q_proj"), rank=12), peft_made(7), peft_made(task=2)]
    found = [search.find(adapter) for adapter in (ADAPTER, *(made.adapter for made in others))]
    assert [initial.seed for initial in found if initial] == [SEED, SEED, SEED, 7, SEED]
    assert found[0] == found[1] == found[4]


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_the_length_of_a_does_not_matter(scale: float) -> None:
    found = seeds().find(changed(ADAPTER, lambda a: scale * a))
    assert found == seeds().find(ADAPTER)


def test_an_a_of_no_known_seed_is_not_found() -> None:
    assert SeedSearch().find(changed(ADAPTER, noise)) is None


def test_an_adapter_in_the_canonical_gauge_is_not_found() -> None:
    # Slots of about the same size: where one is far above the others, its row changes little.
    modules = (LoraModule(module.name, module.a, noise(module.b)) for module in ADAPTER.modules)
    adapter = replace(ADAPTER, modules=tuple(modules))
    assert seeds().find(adapter) is not None
    assert seeds().find(canonicalize(adapter)) is None


def test_zeros_are_of_no_seed_even_after_one_was_found() -> None:
    search = seeds()
    assert search.find(ADAPTER) is not None
    assert search.find(changed(ADAPTER, torch.zeros_like)) is None


def test_a_module_of_zeros_ends_what_is_known() -> None:
    *kept, last = ADAPTER.modules
    found = seeds().find(replace(ADAPTER, modules=(*kept, LoraModule(last.name, 0 * last.a, last.b))))
    assert found is not None
    assert [module.shape.module for module in found.modules] == [module.name for module in kept]


def test_a_module_that_training_made_anew_ends_what_is_known() -> None:
    first, second, *others = ADAPTER.modules
    other = LoraModule(second.name, noise(second.a), second.b)
    found = seeds().find(replace(ADAPTER, modules=(first, other, *others)))
    assert found is not None
    assert [module.shape.module for module in found.modules] == [first.name]


@pytest.mark.parametrize("inputs", [1, 2, 7])
def test_modules_too_small_to_be_certain_are_not_found(inputs: int) -> None:
    module = LoraModule("layers.0.q_proj", torch.ones(1, inputs), torch.ones(3, 1))
    assert SeedSearch().find(Adapter("tiny/llama", None, ("q_proj",), (module,))) is None
