"""The bytes of a code: a round trip, and what is not a code."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from icmlora.adapter.layout import ModuleShape
from icmlora.errors import CodeError, OtherFormat
from icmlora.generator.codec.code import MAGIC, CodeHead, ParsedCode, generator_of
from icmlora.generator.config import GeneratorConfig, ModuleKind
from icmlora.generator.files.container import ABSENT, add_checksum
from icmlora.generator.initial_a.draw import InitialA, InitialModule
from icmlora.generator.scales import EXTREME
from tests.icmlora.small_fleet import mixed_fleet, module_name

CONFIG = mixed_fleet().config()
KINDS, LAYERS, SLOTS = len(CONFIG.kinds), CONFIG.layers, CONFIG.slots
DIGEST = "5a" * 32
INITIAL = InitialA(
    2**32 - 1,
    (
        InitialModule(96, ModuleShape(module_name("q_proj", 0), 2, 24, 24)),
        InitialModule(240, ModuleShape(module_name("q_proj", 1), 1, 24, 24)),
    ),
)
TASK_TYPES = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))


def head(**changes: object) -> CodeHead:
    fields: dict[str, object] = {
        "step": -40,
        "condition": np.arange(CONFIG.condition, dtype=np.int8) - 8,
        "latent": np.arange(CONFIG.latent, dtype=np.int8) - 100,
        "gains": np.array([-300, 0, 7], dtype=np.int16),
        "strengths": (np.arange(KINDS * LAYERS) - 2).astype(np.int8).reshape(KINDS, LAYERS),
        "kept": np.array([[0, SLOTS], [ABSENT, 1], [ABSENT, ABSENT]], dtype=np.uint16),
        "shifts": (np.arange(KINDS * SLOTS) - 5).astype(np.int8).reshape(KINDS, SLOTS),
        "boosts": (np.arange(KINDS * SLOTS) + 7).astype(np.int8).reshape(KINDS, SLOTS),
        "initial": INITIAL,
        "task_type": "CAUSAL_LM",
    }
    return CodeHead(**{**fields, **changes})  # type: ignore[arg-type]


def code(words: bytes = b"12345678", **changes: object) -> bytes:
    return ParsedCode(DIGEST, head(**changes), words).to_bytes(CONFIG)


def framed(packed: bytes) -> bytes:
    data = MAGIC + bytes.fromhex(DIGEST) + struct.pack("<I", len(packed)) + packed
    return add_checksum(data)


@given(
    step=st.integers(-EXTREME, EXTREME),
    small=st.lists(st.integers(-128, 127), min_size=32, max_size=32),
    gains=st.lists(st.integers(-(2**15), 2**15 - 1), min_size=KINDS, max_size=KINDS),
    kept=st.lists(st.sampled_from([0, 1, SLOTS, ABSENT]), min_size=KINDS * LAYERS - 1, max_size=KINDS * LAYERS - 1),
    shifts=st.lists(st.integers(-128, 127), min_size=KINDS * SLOTS, max_size=KINDS * SLOTS),
    boosts=st.lists(st.integers(-128, 127), min_size=KINDS * SLOTS, max_size=KINDS * SLOTS),
    initial=st.sampled_from([None, INITIAL]),
    task_type=TASK_TYPES,
    words=st.binary(max_size=40),
)
def test_any_code_comes_back_from_its_bytes(
    step: int,
    small: list[int],
    gains: list[int],
    kept: list[int],
    shifts: list[int],
    boosts: list[int],
    initial: InitialA | None,
    task_type: str | None,
    words: bytes,
) -> None:
    data = code(
        words,
        step=step,
        condition=np.array(small[:16], dtype=np.int8),
        latent=np.array(small[16:], dtype=np.int8),
        gains=np.array(gains, dtype=np.int16),
        kept=np.array([*kept, 0], dtype=np.uint16).reshape(KINDS, LAYERS),
        shifts=np.array(shifts, dtype=np.int8).reshape(KINDS, SLOTS),
        boosts=np.array(boosts, dtype=np.int8).reshape(KINDS, SLOTS),
        initial=initial,
        task_type=task_type,
    )
    parsed = ParsedCode.from_bytes(data, CONFIG)
    assert (parsed.head.step, parsed.head.task_type, parsed.words) == (step, task_type, words)
    assert [*parsed.head.condition.tolist(), *parsed.head.latent.tolist()] == small
    assert parsed.head.gains.tolist() == gains
    assert parsed.head.strengths.ravel().tolist() == list(range(-2, KINDS * LAYERS - 2))
    assert parsed.head.kept.ravel().tolist() == [*kept, 0]
    assert parsed.head.shifts.ravel().tolist() == shifts
    assert parsed.head.boosts.ravel().tolist() == boosts
    assert parsed.head.initial == initial
    assert parsed.to_bytes(CONFIG) == data


def test_a_code_names_its_generator_without_being_decoded() -> None:
    assert generator_of(code()) == DIGEST


@pytest.mark.parametrize("data", [b"", b"ICMC\x01", b"{" * 99, code()[:40]])
def test_bytes_that_are_no_code_are_refused(data: bytes) -> None:
    with pytest.raises(CodeError, match=r"not an icm code|truncated"):
        generator_of(data)


@pytest.mark.parametrize(
    ("version", "fact"),
    [(3, "was written by icm 0.x, which this version does not read"), (9, "was written by a newer icm")],
)
def test_a_code_of_another_format_is_not_called_damaged(version: int, fact: str) -> None:
    with pytest.raises(OtherFormat, match=f"the code {fact}") as refused:
        generator_of(add_checksum(b"ICMC" + bytes([version]) + bytes(99)))
    assert "icm version that wrote it" in str(refused.value.hint)


@pytest.mark.parametrize("length", range(len(MAGIC) + 36, len(code(b""))))
def test_a_code_cut_in_its_head_is_refused(length: int) -> None:
    with pytest.raises(CodeError):
        ParsedCode.from_bytes(code(b"")[:length], CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": EXTREME + 1},
        {"step": -EXTREME - 1},
        {"kept": np.full((KINDS, LAYERS), ABSENT, dtype=np.uint16)},
        {"kept": np.full((KINDS, LAYERS), SLOTS + 1, dtype=np.uint16)},
        {"kept": np.full((KINDS, LAYERS), 254, dtype=np.uint16)},
        {"latent": np.zeros(3, dtype=np.int8)},
        {"kept": np.zeros((KINDS, 300), dtype=np.uint16).repeat(20, 0)},
        {"task_type": "x" * 5000},
    ],
)
def test_a_head_out_of_its_generators_range_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CodeError, match="head"):
        ParsedCode.from_bytes(code(**changes), CONFIG)


def test_a_head_that_is_not_utf8_or_not_compressed_is_refused() -> None:
    plain = zlib.decompress(code(b"")[len(MAGIC) + 36 : -8])
    for packed in (zlib.compress(plain + b"\xff"), plain):
        with pytest.raises(CodeError, match="damaged"):
            ParsedCode.from_bytes(framed(packed), CONFIG)


def test_anything_between_the_head_and_the_words_is_refused() -> None:
    packed = code(b"")[len(MAGIC) + 36 : -8]
    with pytest.raises(CodeError, match="length"):
        ParsedCode.from_bytes(framed(packed + b"hidden"), CONFIG)


def test_a_head_that_inflates_a_thousandfold_takes_no_memory() -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])
    tracemalloc.start()
    try:
        with pytest.raises(CodeError, match="length"):
            ParsedCode.from_bytes(framed(bomb), CONFIG)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [
        ((ModuleKind("lm_head", 4, 4),), [[1, 1]]),
        ((ModuleKind("lm_head", 4, 4),), [[ABSENT, 1]]),
        ((ModuleKind("layers.{}.q", 4, 4), ModuleKind("layers.{}.q", 8, 8)), [[ABSENT, 1], [1, 1]]),
        ((ModuleKind("layers.1.q", 4, 4), ModuleKind("layers.{}.q", 4, 4)), [[0, ABSENT], [ABSENT, 0]]),
    ],
    ids=["all layers of a module without number", "its second layer", "widths", "a number in the pattern"],
)
def test_a_module_that_is_there_twice_or_cannot_be_there_is_refused(
    kinds: tuple[ModuleKind, ...], kept: list[list[int]]
) -> None:
    config = GeneratorConfig("base", kinds, 2, 2, 0, 0.1)
    none, task = np.zeros((len(kinds), 2), dtype=np.int8), np.zeros(16, dtype=np.int8)
    gains, present = np.zeros(len(kinds), dtype=np.int16), np.array(kept, dtype=np.uint16)
    data = ParsedCode("00" * 32, CodeHead(0, task, task, gains, none, present, none, none, None, None), b"").to_bytes(
        config
    )
    with pytest.raises(CodeError, match="module twice") as caught:
        ParsedCode.from_bytes(data, config)
    assert caught.value.hint is not None
