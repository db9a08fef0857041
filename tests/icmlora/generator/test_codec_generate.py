"""An adapter from task vectors alone."""

from __future__ import annotations

import pytest
import torch

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.errors import GeneratorError
from tests.icmlora.small_fleet import HIDDEN, codec, make_adapter, make_vectors, mixed_fleet, same

LAYOUT = make_adapter(0).layout


@pytest.mark.parametrize("views", [(), ("adapted",), ("context",), ("adapted", "context")])
def test_an_adapter_of_the_layout_is_generated_from_whatever_views_there_are(views: tuple[str, ...]) -> None:
    vectors = {view: make_vectors(0)[view] for view in views}
    made = codec().generate(vectors, LAYOUT, task_type="CAUSAL_LM")
    assert made.layout == LAYOUT
    assert made.task_type == "CAUSAL_LM"
    assert all(torch.isfinite(module.a).all() and torch.isfinite(module.b).all() for module in made.modules)


def test_a_view_changes_what_is_generated() -> None:
    alone = codec().generate({"context": make_vectors(0)["context"]}, LAYOUT, task_type=None)
    assert not same(alone, codec().generate(make_vectors(0), LAYOUT, task_type=None))


def test_without_a_seed_the_same_vectors_give_the_same_adapter() -> None:
    first, second = (codec().generate(make_vectors(0), LAYOUT, task_type=None) for _ in range(2))
    assert same(first, second)


def test_a_seed_decides_what_is_sampled() -> None:
    first, again, other = (codec().generate(make_vectors(0), LAYOUT, task_type=None, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_sampling_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    codec().generate(make_vectors(0), LAYOUT, task_type=None, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_the_fleet_shares_is_generated() -> None:
    made = codec().generate(make_vectors(0), LAYOUT, task_type=None)
    assert squared_error(make_adapter(0), made) < 0.9


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_any_rank_that_the_generator_covers_can_be_made_of_any_kind(rank: int) -> None:
    # No final adapter of this fleet has down_proj with more than one slot.
    layout = make_adapter(0, rank=rank, kinds=("v_proj", "down_proj")).layout
    made = codec().generate(make_vectors(0), layout, task_type=None)
    assert made.layout == layout
    largest = max(dw_norm(mixed_fleet().load(task, None)) for task in range(3))
    assert dw_norm(made) < 4 * largest  # the weights of a channel may be four times those of another


@pytest.mark.parametrize(
    "shape",
    [
        ModuleShape("model.layers.0.self_attn.k_proj", 1, HIDDEN, HIDDEN),
        ModuleShape("model.layers.5.self_attn.q_proj", 1, HIDDEN, HIDDEN),
        ModuleShape("model.layers.0.self_attn.q_proj", 9, HIDDEN, HIDDEN),
    ],
)
def test_a_module_that_the_generator_does_not_cover_is_refused(shape: ModuleShape) -> None:
    with pytest.raises(GeneratorError, match="does not cover"):
        codec().generate(make_vectors(0), [*LAYOUT, shape], task_type=None)


def test_an_untrained_mean_gives_an_adapter_of_zeros_not_of_noise() -> None:
    under = codec()
    with torch.no_grad():
        for direction in under.net.directions:
            direction.zero_()
    assert dw_norm(under.generate(make_vectors(0), LAYOUT, task_type=None)) == 0.0
