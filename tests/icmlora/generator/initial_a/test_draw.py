"""The A that training began with, drawn again: what PEFT drew, from the seed alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.generator.initial_a.draw import InitialA, InitialModule, UniformStream, initial_factors
from tests.icmlora.peft_made import initial_of, peft_made

ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
WHOLE = UniformStream(42).read(0, 3000)


def torchs(seed: int, count: int) -> torch.Tensor:
    """Return what torch draws after a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.empty(count).uniform_(-1, 1)


@pytest.mark.parametrize("seed", [0, 42, 3407, 2**32 - 1])
def test_the_stream_is_that_of_torch(seed: int) -> None:
    assert torch.equal(torch.from_numpy(UniformStream(seed).read(0, 5000)), torchs(seed, 5000))


def test_torch_takes_a_larger_seed_modulo_two_to_the_32() -> None:
    assert torch.equal(torchs(2**32 + 42, 100), torchs(42, 100))


@given(pieces=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), max_size=3))
def test_the_stream_reads_the_same_in_one_go_and_with_gaps(pieces: list[tuple[int, int]]) -> None:
    stream, position = UniformStream(42), 0
    for gap, count in pieces:
        position += gap
        read = stream.read(position, count)
        np.testing.assert_array_equal(read, WHOLE[position : position + count][: len(read)])
        assert len(read) == count
        position += count
        if position > 1200:
            break


def test_a_gap_of_millions_is_skipped() -> None:
    offset = (1 << 21) + 5
    np.testing.assert_array_equal(UniformStream(1).read(offset, 9), UniformStream(1).read(0, offset + 9)[offset:])


def test_a_stream_that_begins_again_is_that_of_the_other_seed() -> None:
    stream = UniformStream(7)
    stream.read(10, 700)
    stream.restart(42)
    np.testing.assert_array_equal(stream.read(3, 100), WHOLE[3:103])


@pytest.mark.parametrize("seed", [0, 42, 99])
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (("q_proj", "v_proj"), {}),
        (("q_proj", "v_proj"), {"rank": 1}),
        (("q_proj", "v_proj"), {"rank": 16, "use_rslora": True, "lora_alpha": 32}),
        (("q_proj", "v_proj"), {"lora_dropout": 0.1, "init_lora_weights": True}),
        (ALL, {"rank_pattern": {"q_proj": 16, "layers.1.mlp.down_proj": 4}}),
        (ALL, {"layers_to_transform": [1]}),
    ],
)
def test_the_initial_a_is_what_peft_drew(seed: int, targets: tuple[str, ...], options: Any) -> None:
    made = peft_made(seed, targets, moved=0, **options)
    factors = initial_factors(initial_of(made.adapter))
    assert set(factors) == set(made.drawn)
    for name, drawn in made.drawn.items():
        # torch rounds once more than icm on processors without fused multiply-add; else the two are the same bits.
        rounding = 2**-23 * drawn.shape[1] ** -0.5
        np.testing.assert_allclose(factors[name], drawn, rtol=0, atol=rounding)


def test_the_order_in_which_modules_are_named_does_not_matter() -> None:
    shapes = [ModuleShape(f"layers.{layer}.q_proj", 2, 6, 4) for layer in range(3)]
    modules = tuple(InitialModule(20 * number, shape) for number, shape in enumerate(shapes))
    forwards, backwards = (initial_factors(InitialA(5, listed)) for listed in (modules, modules[::-1]))
    assert all(np.array_equal(forwards[name], backwards[name]) for name in forwards)
