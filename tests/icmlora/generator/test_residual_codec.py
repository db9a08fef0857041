"""A code with a residual beside it: what the two keep together, whatever the code is."""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icmlora.adapter.metrics import dw_norm, squared_error
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.codec import Codec
from icmlora.generator.container import ABSENT, add_checksum
from icmlora.generator.limits import Limits
from icmlora.generator.residual import CLASSES, MAGIC
from icmlora.generator.residual_codec import ResidualCodec, classes_of
from icmlora.generator.scales import LARGEST, SMALLEST
from tests.icmlora.peft_made import peft_codec, peft_fleet
from tests.icmlora.small_fleet import codec, make_adapter, make_vectors, mixed_fleet, same, with_factors

CODEC = codec()
LAYERED = ResidualCodec(CODEC)
TASKS = [0, 1, 2]


def coarse(task: int, tolerance: float = 0.4) -> tuple[Adapter, bytes]:
    """Return an adapter with a code that keeps little of it."""
    adapter = mixed_fleet().load(task, None)
    return adapter, CODEC.encode(adapter, make_vectors(task), limits=Limits(tolerance=tolerance)).data


def coarse_and_known(task: int, tolerance: float) -> tuple[Adapter, bytes]:
    """Return an adapter whose initial A is known, with a code that keeps little of it."""
    adapter = peft_fleet().load(task, None)
    return adapter, peft_codec().encode(
        adapter, {}, peft_fleet().initial(task), limits=Limits(tolerance=tolerance)
    ).data


@pytest.mark.one_case
@pytest.mark.parametrize("limit", [0.2, 0.02, 1e-3, 1e-6])
@pytest.mark.parametrize("task", TASKS)
def test_code_and_residual_keep_the_limits_for_every_rank_and_kind(task: int, limit: float) -> None:
    adapter, code = coarse(task)
    for limits in (Limits(tolerance=limit), Limits(max_error=math.sqrt(limit))):
        made = LAYERED.encode(adapter, code, limits)
        decoded = LAYERED.decode(code, made.data)
        assert limits.keeps(made)
        assert made.squared_error == squared_error(adapter, decoded)
        assert [module.name for module in decoded.modules] == [module.name for module in adapter.modules]


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 4), exponent=st.integers(-9, 9), tolerance=st.floats(0.05, 0.9))
def test_adapters_unlike_the_fleet_keep_the_limit_too(seed: int, rank: int, exponent: int, tolerance: float) -> None:
    adapter = with_factors(make_adapter(seed, rank, own=3.0), b=10.0**exponent)
    code = CODEC.encode(adapter, {}, limits=Limits(tolerance=tolerance)).data
    assert LAYERED.encode(adapter, code, Limits(max_error=0.1)).squared_error <= 0.01


def moved(codec: Codec, code: bytes, by: int) -> bytes:
    """Return the code with every fifth nonzero integer and all strengths changed, as a refinement may leave them."""
    opened = codec.open(code)
    groups = []
    for group in opened.groups:
        values = group.vectors.values.copy()
        values[::5] += by
        groups.append(replace(group, vectors=replace(group.vectors, values=values)))
    strengths = np.where(opened.head.kept == ABSENT, 0, opened.head.strengths.astype(np.int16) - 20).astype(np.int8)
    return codec.close(replace(opened.head, strengths=strengths), groups)


@pytest.mark.parametrize("by", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_the_residual_of_a_refined_code_keeps_the_limit(task: int, by: int) -> None:
    adapter, code = coarse(task, 0.1)
    refined = moved(CODEC, code, by)
    made = LAYERED.encode(adapter, refined, Limits(max_error=0.1))
    assert CODEC.measure(adapter, refined).squared_error > 0.05
    assert squared_error(adapter, LAYERED.decode(refined, made.data)) <= 0.01


def test_slots_that_the_code_left_out_come_back() -> None:
    adapter = mixed_fleet().load(1, None)
    code = CODEC.encode(adapter, {}, limits=Limits(tolerance=0.5)).data
    made = LAYERED.encode(adapter, code, Limits(max_error=math.sqrt(1e-3)))
    ranks = [
        sum(len(module.a) for module in decoded.modules)
        for decoded in (CODEC.decode(code), LAYERED.decode(code, made.data), adapter)
    ]
    assert ranks[0] < ranks[1] <= ranks[2]


@pytest.mark.one_case
@pytest.mark.parametrize("limit", [0.2, 0.02, 1e-4])
@pytest.mark.parametrize("task", TASKS)
def test_a_residual_beside_a_code_with_an_initial_a_keeps_the_limit(task: int, limit: float) -> None:
    adapter, code = coarse_and_known(task, 0.4)
    under = ResidualCodec(peft_codec())
    made = under.encode(adapter, code, Limits(max_error=math.sqrt(limit)))
    assert made.squared_error == squared_error(adapter, under.decode(code, made.data)) <= limit
    assert same(under.decode(code, made.data), under.decode(code, made.data))


def test_slots_that_a_code_with_an_initial_a_left_out_come_back() -> None:
    adapter, code = coarse_and_known(0, 0.7)
    under = ResidualCodec(peft_codec())
    decoded = under.decode(code, under.encode(adapter, code, Limits(max_error=math.sqrt(1e-3))).data)
    sides = (peft_codec().decode(code), decoded, adapter)
    ranks = [sum(len(module.a) for module in side.modules) for side in sides]
    assert ranks[0] < ranks[1] <= ranks[2]


def test_slots_that_the_code_left_out_take_less_with_an_initial_a() -> None:
    adapter = peft_fleet().load(0, None)
    sizes = []
    for initial in (None, peft_fleet().initial(0)):
        # A code that keeps nothing: all slots are the residual's.
        under, code = peft_codec(), peft_codec().encode(adapter, {}, initial, limits=Limits(tolerance=0.999)).data
        opened = under.open(code)
        head = replace(opened.head, kept=np.where(opened.head.kept == ABSENT, ABSENT, 0).astype(np.uint16))
        empty = under.close(head, [])
        sizes.append(len(ResidualCodec(under).encode(adapter, empty, Limits(max_error=math.sqrt(0.1))).data))
    assert sizes[1] < 0.9 * sizes[0]


def test_a_smaller_limit_takes_more_bytes() -> None:
    adapter, code = coarse(1)
    sizes = [
        len(LAYERED.encode(adapter, code, Limits(max_error=math.sqrt(limit))).data) for limit in (0.2, 0.02, 0.002)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_code_and_residual_take_little_more_than_one_code_of_the_same_error() -> None:
    adapter, code = coarse(1, 0.3)
    made = LAYERED.encode(adapter, code, Limits(max_error=math.sqrt(1e-3)))
    single = CODEC.encode(adapter, make_vectors(1), limits=Limits(max_error=math.sqrt(1e-3)))
    assert len(code) + len(made.data) < 1.35 * len(single.data)


def test_an_adapter_of_zeros_has_a_residual_that_adds_nothing() -> None:
    zeros = with_factors(make_adapter(0), b=0.0)
    code = CODEC.encode(zeros, {}).data
    made = LAYERED.encode(zeros, code, Limits(max_error=math.sqrt(0.1)))
    assert dw_norm(LAYERED.decode(code, made.data)) == 0.0


def test_a_module_of_zeros_among_others_comes_back_as_zeros() -> None:
    first, *rest = make_adapter(0).modules
    modules = (LoraModule(first.name, first.a, 0 * first.b), *rest)
    adapter = Adapter("tiny/llama", "CAUSAL_LM", ("q_proj", "v_proj"), modules)
    code = CODEC.encode(adapter, {}, limits=Limits(tolerance=0.4)).data
    decoded = LAYERED.decode(code, LAYERED.encode(adapter, code, Limits(max_error=0.1)).data)
    assert not decoded.modules[0].b.any()
    assert decoded.task_type == "CAUSAL_LM"


def test_the_same_residual_decodes_to_the_same_bits_every_time() -> None:
    adapter, code = coarse(0)
    made = [LAYERED.encode(adapter, code, Limits(max_error=0.1)).data for _ in range(2)]
    assert made[0] == made[1]
    assert same(LAYERED.decode(code, made[0]), LAYERED.decode(code, made[0]))


def test_a_limit_that_float32_cannot_keep_is_refused() -> None:
    with pytest.raises(GeneratorError, match="1e-16"):
        LAYERED.encode(*coarse(0), Limits(max_error=1e-08))


def test_the_code_of_another_adapter_is_refused() -> None:
    _, code = coarse(1, 0.001)
    with pytest.raises(CodeError, match="belongs to another adapter"):
        LAYERED.encode(make_adapter(5, rank=1), code, Limits(max_error=math.sqrt(0.1)))


def test_a_class_says_whether_the_integer_is_zero_and_how_likely_that_was() -> None:
    integers = np.array([3, -1, 0, 0, 0, 0], dtype=np.int32)
    scales = np.array([5, SMALLEST, SMALLEST, SMALLEST + 4, 0, LARGEST], dtype=np.int8)
    assert classes_of(integers, scales).tolist() == [0, 0, 1, 2, 9, CLASSES - 1]


ADAPTER, CODE = coarse(1)
DATA = LAYERED.encode(ADAPTER, CODE, Limits(max_error=0.1)).data
HEAD = len(MAGIC) + 36
WORDS = HEAD + int(struct.unpack_from("<I", DATA, HEAD - 4)[0])


def test_any_byte_that_is_changed_is_refused() -> None:
    for place in range(len(DATA)):
        changed = bytearray(DATA)
        changed[place] ^= 1 << place % 8
        with pytest.raises(CodeError):
            LAYERED.decode(CODE, bytes(changed))


@pytest.mark.parametrize("length", range(0, len(DATA), 7))
def test_a_residual_cut_short_is_refused(length: int) -> None:
    with pytest.raises(CodeError):
        LAYERED.decode(CODE, DATA[:length])


def test_the_residual_of_another_code_is_refused_by_name() -> None:
    _, other = coarse(1, 0.3)
    with pytest.raises(CodeError, match=hashlib.sha256(CODE).hexdigest()[:12]):
        LAYERED.decode(other, DATA)


def test_a_code_in_the_place_of_a_residual_is_refused() -> None:
    with pytest.raises(CodeError, match="not an icm residual"):
        LAYERED.decode(CODE, CODE)


@given(words=st.binary(max_size=200))
def test_any_words_under_a_valid_head_are_an_adapter_or_refused(words: bytes) -> None:
    try:
        decoded = LAYERED.decode(CODE, add_checksum(DATA[:WORDS] + words))
    except CodeError:
        return
    assert decoded.layout


@pytest.mark.parametrize(
    ("place", "value", "fact"),
    [
        (2 + 8, 0, "less than the code keeps"),
        (2 + 8, 5, "more slots than there are"),
        (2 + 8, ABSENT, "a module of the code is missing"),
        (2 + 12, SMALLEST - 1, "a scale that has no table"),
    ],
)
def test_the_head_is_checked_even_where_its_checksum_is_right(place: int, value: int, fact: str) -> None:
    plain = bytearray(zlib.decompress(DATA[HEAD:WORDS]))
    plain[place] = value & 255
    packed = zlib.compress(bytes(plain))
    with pytest.raises(CodeError, match="range"):
        LAYERED.decode(CODE, add_checksum(DATA[: HEAD - 4] + struct.pack("<I", len(packed)) + packed + DATA[WORDS:-8]))
