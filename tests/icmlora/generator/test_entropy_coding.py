"""The entropy coder: whatever integers, under whatever scales, come back."""

from __future__ import annotations

import hashlib

import constriction
import numpy as np
import pytest
from hypothesis import given, strategies as st

from icmlora.errors import CodeError
from icmlora.generator.files.entropy_coding import LIMIT, IntegerReader, Integers, IntegerWriter, clip
from icmlora.generator.scales import LARGEST, SMALLEST, probabilities, reach_of

SCALE = st.integers(SMALLEST, LARGEST)
PAIRS = st.lists(st.tuples(st.one_of(st.integers(-40, 40), st.integers(-LIMIT, LIMIT)), SCALE), max_size=60)


def arrays(pairs: list[tuple[int, int]]) -> tuple[Integers, Integers]:
    values = np.array([value for value, _ in pairs], dtype=np.int32)
    return values, np.array([scale for _, scale in pairs], dtype=np.int32)


def written(*parts: tuple[Integers, Integers]) -> bytes:
    writer = IntegerWriter()
    for values, scales in parts:
        writer.write(values, scales)
    return writer.to_bytes()


def gaussian(count: int, scale: int) -> tuple[Integers, Integers]:
    values = np.random.default_rng(0).normal(0, 2.0 ** (scale / 8), count)
    return clip(np.rint(values)), np.full(count, scale, dtype=np.int32)


@given(first=PAIRS, second=PAIRS)
def test_any_integers_come_back_under_any_scales(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    parts = [arrays(first), arrays(second)]
    reader = IntegerReader(written(*parts))
    for values, scales in parts:
        np.testing.assert_array_equal(reader.read(scales), values)


def test_the_words_are_those_that_earlier_releases_wrote() -> None:
    """A release of `constriction` that rounds frequencies in another way would make every code unreadable."""
    number = np.arange(200_000)
    values = np.where(number % 5, 0, number * 2654435761 % 2**32 % 41 - 20).astype(np.int32)
    scales = (SMALLEST + number % (LARGEST - SMALLEST + 1)).astype(np.int32)
    wanted = "d7f96e4a4325c3ed7e652b045c1cd8e7df3c05a271a123153c2ebc1cfde8cf03"
    assert hashlib.sha256(written((values, scales))).hexdigest() == wanted


@given(pairs=PAIRS)
def test_the_width_of_the_scales_changes_nothing(pairs: list[tuple[int, int]]) -> None:
    values, scales = arrays(pairs)
    narrow = scales.astype(np.int8)
    data = written((values, scales))
    assert written((values, narrow)) == data
    np.testing.assert_array_equal(IntegerReader(data).read(narrow), values)


@given(pairs=st.lists(st.tuples(st.integers(-40, 40), SCALE), max_size=60))
def test_a_few_integers_are_written_by_ascending_scale_in_their_own_order(pairs: list[tuple[int, int]]) -> None:
    # What the format says, one integer at a time; the coder is a stack.
    inside = [(value, scale) for value, scale in pairs if abs(value) < reach_of(scale)]
    coder = constriction.stream.stack.AnsCoder()
    for value, scale in sorted(inside, key=lambda pair: pair[1])[::-1]:
        model = constriction.stream.model.Categorical(probabilities(scale), perfect=False)
        coder.encode_reverse(np.array([value + reach_of(scale)], dtype=np.int32), model)
    assert written(arrays(inside)) == coder.get_compressed().astype("<u4").tobytes()


@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 4000), min_size=1, max_size=4),
    scales=st.lists(st.integers(SMALLEST, -6), min_size=4, max_size=4, unique=True),
    share=st.sampled_from([0.0, 2e-4, 0.01, 0.2, 1.0]),
)
def test_many_integers_of_small_scales_come_back_however_rare_those_are_that_are_not_zero(
    seed: int, counts: list[int], scales: list[int], share: float
) -> None:
    draw = np.random.default_rng(seed)
    under = draw.permutation(np.repeat(np.array(scales[: len(counts)], dtype=np.int8), counts))
    is_zero = draw.random(len(under)) >= share
    values = np.where(is_zero, 0, draw.choice([-LIMIT, -5, -1, 1, 2, LIMIT], len(under))).astype(np.int32)
    np.testing.assert_array_equal(IntegerReader(written((values, under))).read(under), values)


@pytest.mark.parametrize("scale", [SMALLEST, -20, -12, -7, 0, 9, 30])
def test_many_integers_take_no_more_than_one_at_a_time(scale: int) -> None:
    values = np.random.default_rng(scale + 40).normal(0, 2.0 ** (scale / 8), 200_001)
    whole = clip(np.rint(values * np.where(np.random.default_rng(0).random(len(values)) < 0.05, 2, 1)))
    under, reach = np.full(len(whole), scale, dtype=np.int8), reach_of(scale)
    beyond = np.abs(whole)[np.abs(whole) >= reach] - (reach - 1)
    bits = -np.log2(probabilities(scale))[np.clip(whole, -reach, reach) + reach].sum()
    bits += (2 * np.floor(np.log2(beyond)) + 1).sum()
    data = written((whole, under))
    assert 8 * len(data) < 1.001 * bits + 128
    np.testing.assert_array_equal(IntegerReader(data).read(under), whole)


@given(scale=SCALE, offset=st.integers(-2, 2), sign=st.sampled_from([-1, 1]))
def test_integers_around_the_end_of_a_table_come_back(scale: int, offset: int, sign: int) -> None:
    values, scales = arrays([(sign * (reach_of(scale) + offset), scale), (0, scale)])
    np.testing.assert_array_equal(IntegerReader(written((values, scales))).read(scales), values)


def test_nothing_is_written_as_nothing() -> None:
    empty = arrays([])
    reader = IntegerReader(written(empty))
    assert len(reader.read(empty[1])) == 0


def test_gaussian_integers_take_about_their_entropy() -> None:
    values, scales = gaussian(4000, 16)
    entropy = np.log2(4 * np.sqrt(2 * np.pi * np.e))
    assert entropy * 0.97 < 8 * len(written((values, scales))) / 4000 < entropy * 1.06


def test_an_integer_far_beyond_its_scale_costs_tens_of_bits_not_thousands() -> None:
    values, scales = gaussian(400, 0)
    outlier = values.copy()
    outlier[7] = LIMIT
    assert len(written((outlier, scales))) - len(written((values, scales))) <= 12


def test_clipping_keeps_what_can_be_written() -> None:
    assert clip(np.array([-3.0, 1e12, -1e12])).tolist() == [-3, LIMIT, -LIMIT]


def test_half_a_word_is_refused() -> None:
    with pytest.raises(CodeError, match="end within a word"):
        IntegerReader(b"\0\0\0")


@given(data=st.binary(max_size=64), pairs=PAIRS)
def test_any_words_are_integers_in_range_or_refused(data: bytes, pairs: list[tuple[int, int]]) -> None:
    words, (_, scales) = data[: len(data) // 4 * 4], arrays(pairs)
    try:
        values = IntegerReader(words).read(scales)
    except CodeError:
        return
    assert len(values) == len(scales)
    assert np.abs(values).max(initial=0) <= 2 * LIMIT + reach_of(LARGEST)
