"""The row space of an initial A: orthonormal rows, and what of the inputs lies along them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import NotCovered
from icmlora.generator.config import GeneratorConfig, ModuleKind
from icmlora.generator.initial_a.draw import InitialA, InitialModule, initial_factors
from icmlora.generator.initial_a.subspace import InitialSubspace, initial_subspace
from icmlora.generator.sensitivity import even
from tests.icmlora.peft_made import HIDDEN, peft_fleet
from tests.icmlora.small_fleet import module_name, uneven

CONFIG = peft_fleet().config()
WEIGHTS = uneven(CONFIG)
Q = CONFIG.place_of(ModuleShape(module_name("q_proj", 0), 8, HIDDEN, HIDDEN))[0]
LAYER = torch.tensor([0, 0, 0, 1, 1])


def initial() -> InitialA:
    """Return one whose q_proj has 8 rows in layer 0 and 6 in layer 1."""
    found = peft_fleet().initial(1)
    assert found is not None
    return found


def subspace(of: InitialA | None) -> InitialSubspace:
    return initial_subspace(of, CONFIG, WEIGHTS)


def first_layer() -> InitialA:
    """Return one of which only the modules of layer 0 are known."""
    return replace(initial(), modules=initial().modules[:2])


def values(seed: int = 0) -> torch.Tensor:
    return torch.randn(len(LAYER), HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_rows_of_every_module_are_orthonormal_and_zero_beyond_its_rank() -> None:
    known = subspace(initial())
    assert known.ranks_of(Q).tolist() == [8, 6]
    assert known.rows(Q) == 8
    for kind, bases in known.bases.items():
        for basis, rank in zip(bases, known.ranks_of(kind).tolist(), strict=True):
            wanted = torch.diag((torch.arange(len(basis)) < rank).float())
            torch.testing.assert_close(basis @ basis.T, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_rows_span_the_initial_a_times_the_weights_of_its_channels(layer: int) -> None:
    drawn = torch.from_numpy(initial_factors(initial())[module_name("q_proj", layer)])
    rows = drawn * torch.exp2(WEIGHTS.inputs[Q][layer])
    place = torch.full((len(rows),), layer)
    known = subspace(initial())
    again = known.expand(Q, place, known.project(Q, place, rows), HIDDEN)
    torch.testing.assert_close(again, rows, rtol=0, atol=1e-6)


@given(seed=st.integers(0, 1000))
def test_what_lies_along_the_subspace_is_taken_out_once(seed: int) -> None:
    known, x = subspace(initial()), values(seed)
    once = known.expand(Q, LAYER, known.project(Q, LAYER, x), HIDDEN)
    twice = known.expand(Q, LAYER, known.project(Q, LAYER, once), HIDDEN)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)
    torch.testing.assert_close(known.project(Q, LAYER, x - once), torch.zeros(5, 8).double(), rtol=0, atol=1e-5)
    assert (once.norm(dim=1) <= x.norm(dim=1)).all()


def test_rows_beyond_a_modules_rank_are_zeros() -> None:
    along = subspace(initial()).project(Q, LAYER, values())
    assert not along[LAYER == 1, 6:].any()
    assert along[LAYER == 0].all()


def test_nothing_lies_along_the_subspace_of_modules_that_are_not_known() -> None:
    known = subspace(first_layer())
    along = known.project(Q, LAYER, values())
    assert known.ranks_of(Q).tolist() == [8, 0]
    assert not along[LAYER == 1].any()
    assert not known.expand(Q, LAYER, along, HIDDEN)[LAYER == 1].any()
    assert known.project(Q, LAYER, values())[LAYER == 0].any()


def test_without_an_initial_a_there_are_no_rows() -> None:
    known = subspace(None)
    assert known.rows(Q) == 0
    assert known.ranks_of(Q).tolist() == [0, 0]
    assert known.project(Q, LAYER, values()).shape == (5, 0)
    assert torch.equal(known.expand(Q, LAYER, torch.zeros(5, 0), HIDDEN), torch.zeros(5, HIDDEN))
    assert not known.shifts.any()


def test_tokens_that_are_not_there_have_nothing_along_it() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert subspace(initial()).project(Q, none, torch.zeros(0, HIDDEN)).shape == (0, 8)
    assert subspace(initial()).expand(Q, none, torch.zeros(0, 8), HIDDEN).shape == (0, HIDDEN)


def test_a_vector_within_the_subspace_is_spread_over_the_rows_that_there_are() -> None:
    spread = subspace(first_layer()).spread(Q, LAYER)
    np.testing.assert_allclose(spread.square().sum(1).numpy(), [1, 1, 1, 0, 0], rtol=1e-6)
    short = subspace(initial()).spread(Q, LAYER)[LAYER == 1]
    assert short[:, :6].all()
    assert not short[:, 6:].any()


def test_the_same_initial_a_has_the_same_rows() -> None:
    assert all(torch.equal(subspace(initial()).bases[kind], basis) for kind, basis in subspace(initial()).bases.items())


def test_a_module_with_as_many_rows_as_inputs_is_left_out() -> None:
    kinds = (ModuleKind("layers.{}.q_proj", 4, 6),)
    config = GeneratorConfig("tiny/llama", kinds, layers=2, slots=8, condition_size=0, tolerance=0.1)
    shapes = [ModuleShape("layers.0.q_proj", 4, 4, 6), ModuleShape("layers.1.q_proj", 3, 4, 6)]
    modules = tuple(InitialModule(100 * number, shape) for number, shape in enumerate(shapes))
    assert initial_subspace(InitialA(1, modules), config, even(config)).ranks_of(0).tolist() == [0, 3]
    assert initial_subspace(InitialA(1, modules[:1]), config, even(config)).bases == {}


def test_a_module_that_the_generator_does_not_cover_is_refused() -> None:
    stranger = InitialModule(0, ModuleShape("layers.0.lm_head", 2, 8, 8))
    with pytest.raises(NotCovered):
        subspace(InitialA(1, (stranger,)))
