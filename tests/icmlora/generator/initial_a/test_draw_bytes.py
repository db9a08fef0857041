"""The bytes that say where an initial A was drawn: a round trip, and draws that are refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import CodeError, NotCovered
from icmlora.generator.config import GeneratorConfig, ModuleKind
from icmlora.generator.initial_a.draw import (
    InitialA,
    InitialModule,
    initial_factors,
    initial_from_bytes,
    initial_size,
    initial_to_bytes,
)
from tests.icmlora.peft_made import peft_fleet
from tests.icmlora.small_fleet import mixed_fleet

CONFIG = mixed_fleet().config()
KINDS, LAYERS, SLOTS = len(CONFIG.kinds), CONFIG.layers, CONFIG.slots
PLACES = [(kind, layer) for kind in range(KINDS) for layer in range(LAYERS)]
LIMIT = 2 * SLOTS * LAYERS * sum(kind.inputs + kind.outputs for kind in CONFIG.kinds)
SEEDS = st.integers(0, 2**32 - 1)


def shape_at(kind: int, layer: int, rank: int) -> ModuleShape:
    place = CONFIG.kinds[kind]
    return ModuleShape(place.module(layer), rank, place.inputs, place.outputs)


def written(ranks: dict[tuple[int, int], int], offsets: dict[tuple[int, int], int], seed: int = 42) -> bytes:
    """Write ranks and offsets by place as they are, right or wrong."""
    rank, offset = np.zeros((KINDS, LAYERS), dtype=np.uint8), np.zeros((KINDS, LAYERS), dtype=np.int64)
    for place, value in ranks.items():
        rank[place] = value
    for place, value in offsets.items():
        offset[place] = value
    for _ in range(2):
        offset = np.diff(offset, axis=1, prepend=0)
    return struct.pack("<I", seed) + rank.tobytes() + offset.tobytes()


@st.composite
def initials(draw: st.DrawFn) -> InitialA:
    """Draw modules in any order, each as far behind the one before as PEFT leaves between them, or less."""
    modules, position = [], 0
    for kind, layer in draw(st.permutations(PLACES))[: draw(st.integers(1, len(PLACES)))]:
        shape = shape_at(kind, layer, draw(st.integers(1, SLOTS)))
        modules.append(InitialModule(position + draw(st.integers(0, shape.parameters)), shape))
        position = modules[-1].end
    return InitialA(draw(SEEDS), tuple(modules))


@given(initial=initials())
def test_any_initial_a_comes_back_from_its_bytes(initial: InitialA) -> None:
    data = initial_to_bytes(initial, CONFIG)
    assert len(data) == initial_size(CONFIG)
    assert initial_from_bytes(data, CONFIG) == initial


@pytest.mark.parametrize("task", [0, 1, 2])
def test_what_peft_drew_comes_back(task: int) -> None:
    config, initial = peft_fleet().config(), peft_fleet().initial(task)
    assert initial_from_bytes(initial_to_bytes(initial, config), config) == initial


def test_nothing_known_is_all_zeros() -> None:
    assert initial_to_bytes(None, CONFIG) == bytes(initial_size(CONFIG))
    assert initial_from_bytes(bytes(initial_size(CONFIG)), CONFIG) is None


def test_layers_that_are_alike_take_next_to_nothing() -> None:
    kinds = tuple(ModuleKind(f"layers.{{}}.{name}_proj", 64, 64) for name in "kqv")
    config = GeneratorConfig("tiny/llama", kinds, layers=40, slots=8, condition_size=0, tolerance=0.1)
    shapes = [ModuleShape(kind.module(layer), 8, 64, 64) for layer in range(40) for kind in kinds]
    modules = tuple(InitialModule(1024 + 1536 * number, shape) for number, shape in enumerate(shapes))
    initial = InitialA(42, modules)
    assert initial_from_bytes(initial_to_bytes(initial, config), config) == initial
    assert len(zlib.compress(initial_to_bytes(initial, config))) < 60


def test_a_module_that_the_generator_does_not_cover_is_refused() -> None:
    stranger = InitialModule(0, ModuleShape("model.layers.0.lm_head", 2, 24, 24))
    with pytest.raises(NotCovered):
        initial_to_bytes(InitialA(1, (stranger,)), CONFIG)


@pytest.mark.parametrize(
    ("ranks", "offsets"),
    [
        ({(1, 0): 2, (1, 1): 2}, {(1, 0): 0, (1, 1): 47}),
        ({(1, 0): 1, (2, 0): 1}, {(1, 0): 7, (2, 0): 7}),
        ({(1, 0): 2, (1, 1): 2}, {(1, 0): 100, (1, 1): 60}),
        ({(1, 0): SLOTS + 1}, {(1, 0): 0}),
        ({(1, 0): 255}, {(1, 0): 0}),
        ({(1, 0): 1}, {(1, 0): -1}),
        ({(1, 0): 1}, {(1, 0): -(2**63)}),
        ({(1, 0): 1}, {(1, 0): 2**63 - 1}),
        ({(1, 0): 1}, {(1, 0): LIMIT - 23}),
        ({(1, 0): 1, (1, 1): 1}, {(1, 0): 0, (1, 1): 2**40}),
    ],
    ids=["overlap", "same place", "overlap backwards", "rank", "largest rank", "negative", "most negative", "far",
         "just beyond the last draw", "one far"],
)  # fmt: skip
def test_draws_that_no_training_begins_with_are_refused(
    ranks: dict[tuple[int, int], int], offsets: dict[tuple[int, int], int]
) -> None:
    with pytest.raises(CodeError, match="initial A"):
        initial_from_bytes(written(ranks, offsets), CONFIG)


@pytest.mark.parametrize("offset", [0, LIMIT - 24])
def test_draws_at_the_ends_of_the_stream_are_read(offset: int) -> None:
    found = initial_from_bytes(written({(1, 0): 1}, {(1, 0): offset}), CONFIG)
    assert found == InitialA(42, (InitialModule(offset, shape_at(1, 0, 1)),))


def test_modules_that_touch_are_read() -> None:
    found = initial_from_bytes(written({(1, 0): 2, (1, 1): 2}, {(1, 0): 0, (1, 1): 48}), CONFIG)
    assert found is not None
    assert [module.offset for module in found.modules] == [0, 48]


@pytest.mark.parametrize(
    ("kinds", "ranks"),
    [
        ((ModuleKind("lm_head", 8, 8),), [[1, 2]]),
        ((ModuleKind("lm_head", 8, 8),), [[0, 2]]),
        ((ModuleKind("layers.{}.q", 4, 4), ModuleKind("layers.{}.q", 8, 8)), [[1, 0], [1, 0]]),
    ],
    ids=["two layers of a module without number", "its second layer", "widths"],
)
def test_a_module_that_was_drawn_twice_or_cannot_be_there_is_refused(
    kinds: tuple[ModuleKind, ...], ranks: list[list[int]]
) -> None:
    config = GeneratorConfig("base", kinds, 2, 2, 0, 0.1)
    apart = np.diff(np.arange(2 * len(kinds)).reshape(-1, 2) * 16, n=1, axis=1, prepend=0)
    offsets = np.diff(apart, axis=1, prepend=0).astype("<i8")
    data = bytes(4) + np.array(ranks, dtype=np.uint8).tobytes() + offsets.tobytes()
    with pytest.raises(CodeError, match="module twice") as caught:
        initial_from_bytes(data, config)
    assert caught.value.hint is not None


NUMBERS = st.one_of(st.integers(-64, LIMIT), st.integers(-(2**63), 2**63 - 1))


@given(
    seed=SEEDS,
    ranks=st.lists(st.integers(0, 255) | st.integers(0, SLOTS), min_size=len(PLACES), max_size=len(PLACES)),
    offsets=st.lists(NUMBERS, min_size=len(PLACES), max_size=len(PLACES)),
)
def test_any_bytes_are_refused_or_draws_within_the_generators_layout(
    seed: int, ranks: list[int], offsets: list[int]
) -> None:
    numbers: NDArray[np.int64] = np.array(offsets, dtype=np.int64)
    data = struct.pack("<I", seed) + bytes(ranks) + numbers.tobytes()
    try:
        found = initial_from_bytes(data, CONFIG)
    except CodeError:
        return
    for module in () if found is None else found.modules:
        assert 0 <= module.offset < module.end <= LIMIT
    if found is not None:
        assert len(initial_factors(found)) == len(found.modules)
