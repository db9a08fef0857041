"""Bytes that no baseline wrote: each is refused as a `CodeError`, or read as an adapter of the same modules."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icmlora.adapter.model import Adapter
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import baseline_named
from icmlora.baselines.head import ByteReader, Head
from icmlora.errors import CodeError
from tests.icmlora.small_fleet import make_adapter, same

NAMES = ["bf16", "int8", "nf4", "3bitg8", "svd2-2bit", "loraquant2", "mean4+svd1-4bit", "jd4", "jd3x2diag-int8"]
FLEET = {"a": make_adapter(0), "b": make_adapter(1, rank=4), "c": make_adapter(2, rank=3)}

Written = tuple[Baseline, bytes, bytes]


@pytest.fixture(scope="module", params=NAMES)
def written(request: pytest.FixtureRequest) -> Written:
    """Return a baseline with the bytes of a fleet and of one task."""
    baseline = baseline_named(request.param)
    shared = baseline.prepare(FLEET)
    return baseline, shared, baseline.encode(FLEET["a"], shared)


def shapes(adapter: Adapter) -> list[tuple[str, int, int]]:
    return [(shape.module, shape.inputs, shape.outputs) for shape in adapter.layout]


def test_a_code_that_ends_early_is_refused_wherever_it_ends(written: Written) -> None:
    baseline, shared, code = written
    for end in [*range(0, len(code), 7), len(code) - 1]:
        with pytest.raises(CodeError):
            baseline.decode(code[:end], shared)


def test_shared_bytes_that_end_early_are_refused_wherever_they_end(written: Written) -> None:
    baseline, shared, code = written
    for end in [*range(0, len(shared), 29), len(shared) - 1] if shared else ():
        with pytest.raises(CodeError):
            baseline.decode(code, shared[:end])


@settings(max_examples=25)
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_an_adapter_of_the_same_modules_or_is_refused(
    written: Written, at: float, bit: int
) -> None:
    baseline, shared, code = written
    changed = bytearray(code)
    changed[int(at * len(code))] ^= 1 << bit
    try:
        decoded = baseline.decode(bytes(changed), shared)
    except CodeError:
        return
    assert shapes(decoded) == shapes(baseline.decode(code, shared))


@settings(max_examples=25)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(written: Written, junk: bytes) -> None:
    baseline, shared, _ = written
    with pytest.raises(CodeError):
        baseline.decode(junk, shared)


def test_the_codes_of_two_tasks_are_not_one_code(written: Written) -> None:
    baseline, shared, code = written
    with pytest.raises(CodeError, match="bytes too many"):
        baseline.decode(code + baseline.encode(FLEET["b"], shared), shared)


def test_what_is_decoded_is_encoded_again_as_nearly_the_same(written: Written) -> None:
    baseline, shared, code = written
    decoded = baseline.decode(code, shared)
    again = baseline.decode(baseline.encode(decoded, shared), shared)
    assert shapes(again) == shapes(decoded)
    assert same(decoded, baseline.decode(code, shared))  # encoding left it as it was


GROUP: list[Any] = ["layers.#.q", [[0, 1]], 2, 8, 6]


def packed(fields: object) -> bytes:
    text = zlib.compress(json.dumps(fields).encode())
    return len(text).to_bytes(2, "little") + text


def with_group(place: int, value: object) -> list[Any]:
    """Return the fields of a head, with something else in one place of its only entry."""
    return ["base", None, None, [[*GROUP[:place], value, *GROUP[place + 1 :]]]]


def test_a_head_that_is_in_order_is_read() -> None:
    head = Head.read(ByteReader(packed(["base", "CAUSAL_LM", None, [GROUP]])))
    assert [tuple(shape) for shape in head.layout] == [("layers.0.q", 2, 8, 6), ("layers.1.q", 2, 8, 6)]


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {},
        [],
        ["base", None, None],
        ["base", None, None, []],
        ["base", None, None, [GROUP, GROUP]],
        ["base", None, None, [[]]],
        ["base", None, None, [[*GROUP, 1]]],
        [None, None, None, [GROUP]],
        ["base", 3, None, [GROUP]],
        ["base", None, [], [GROUP]],
        *(with_group(0, name) for name in (5, None, "", "../x", "a b", "layers.\x1b")),
        *(with_group(1, runs) for runs in (None, 3, [[0]], [[0, 1, 2]], [["0", "1"]], [[1, 0]], [[-2, 0]], [])),
        *(with_group(1, [[0, last]]) for last in (20_000, 10**12)),
        ["base", None, None, [[f"a{number}.#", [[0, 19_000]], 1, 1, 1] for number in range(1000)]],
        *(with_group(place, size) for place in (2, 3, 4) for size in (0, -1, 2.0, "2", None, True, 10**20)),
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_a_head_that_is_not_an_adapters_is_refused(fields: object) -> None:
    with pytest.raises(CodeError, match="head"):
        Head.read(ByteReader(packed(fields)))


def test_a_head_that_grows_beyond_its_limit_is_refused_before_it_fills_the_memory() -> None:
    bomb = zlib.compress(b" " * (64 << 20), 9)
    assert len(bomb) < 1 << 17
    with pytest.raises(CodeError):
        Head.read(ByteReader(len(bomb[:65535]).to_bytes(2, "little") + bomb[:65535]))


def test_a_head_that_claims_a_huge_matrix_is_refused_before_one_is_made() -> None:
    huge = packed(["base", None, None, [["q", [[-1, -1]], 2**31, 2**31, 2**31]]])
    for name in ("bf16", "int8", "nf4", "2bit", "2bitg64"):
        with pytest.raises(CodeError, match="were expected"):
            baseline_named(name).decode(huge, b"")


def test_a_joint_code_that_names_a_module_without_a_basis_is_refused() -> None:
    baseline = baseline_named("jd2")
    shared = baseline.prepare({"a": make_adapter(0, kinds=("q_proj",))})
    other = Head.of(make_adapter(0, kinds=("v_proj",))).to_bytes()
    with pytest.raises(CodeError, match="has no basis"):
        baseline.decode(b"\0" + other + bytes(100), shared)


def test_a_difference_of_other_widths_than_the_mean_is_refused() -> None:
    baseline = baseline_named("mean2+svd1")
    shared = baseline.prepare(FLEET)
    name = FLEET["a"].layout[0].module
    wide = packed(["base", None, None, [[name, [[-1, -1]], 1, 3, 3]]])
    with pytest.raises(CodeError, match="other widths"):
        baseline.decode(wide + bytes(2 * 6), shared)


def test_a_mean_alone_takes_no_code() -> None:
    baseline = baseline_named("mean2")
    with pytest.raises(CodeError, match="only the fleet's mean"):
        baseline.decode(b"\0", baseline.prepare(FLEET))


@given(st.binary(max_size=40), st.lists(st.integers(0, 12), max_size=6))
def test_a_reader_gives_every_byte_once_and_no_byte_that_is_not_there(data: bytes, sizes: list[int]) -> None:
    reader, got = ByteReader(data), b""
    for size in sizes:
        if len(got) + size > len(data):
            with pytest.raises(CodeError, match=f"ends after {len(data)} bytes"):
                reader.take(size)
            continue
        got += reader.take(size)
    assert data.startswith(got)
    if got != data:
        with pytest.raises(CodeError, match=f"{len(data) - len(got)} bytes too many"):
            reader.finish()
    else:
        reader.finish()


def test_values_that_are_not_finite_come_back_as_they_are_stored() -> None:
    adapter = make_adapter(0, kinds=("q_proj",), layers=(0,), rank=1)
    code = baseline_named("bf16").encode(adapter, b"")
    decoded = baseline_named("bf16").decode(code[:-2] + b"\x80\x7f", b"")
    assert torch.isinf(decoded.modules[0].b[-1, -1])
