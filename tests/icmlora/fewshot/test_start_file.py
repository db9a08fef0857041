"""A start file comes back as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from icmlora.adapter.model import Adapter
from icmlora.errors import GeneratorError, IcmLoraError
from icmlora.fewshot.start import FewShotStart, untrained_fewshot_start
from icmlora.fewshot.start_file import MAGIC, fewshot_start_from_bytes, fewshot_start_to_bytes, mean_code
from icmlora.generator.codec.codec import Codec
from icmlora.generator.files.container import add_checksum
from tests.icmlora.small_fleet import codec, make_adapter, same, trained_file

MEAN = make_adapter(0)
MODULES = len(MEAN.modules)
WHOLE = st.integers(-1024, 1024)


def rows(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[WHOLE] * count)


@st.composite
def starts(draw: st.DrawFn) -> FewShotStart:
    steps = draw(st.integers(1, 64))
    return FewShotStart(
        MEAN,
        draw(rows(MODULES)),
        tuple(draw(rows(MODULES)) for _ in range(steps)),
        draw(rows(steps)),
        draw(rows(steps)),
        draw(st.integers(1, 100_000)),
    )


def decode(code: bytes) -> Adapter:
    assert code == b"the mean's code"
    return MEAN


def start() -> FewShotStart:
    return FewShotStart(MEAN, (1,) * MODULES, ((2,) * MODULES, (3,) * MODULES), (4, 5), (-1, 1), 6)


def written(**changes: object) -> bytes:
    """Return a sealed file whose head says something else."""
    head = {"sizes": [1] * MODULES, "rates": [[2] * MODULES], "slopes": [4], "in_context": [1], "tasks": 6} | changes
    packed = zlib.compress(json.dumps(head).encode())
    return add_checksum(MAGIC + struct.pack("<I", len(packed)) + packed + b"the mean's code")


@given(starts())
def test_what_is_written_is_read_back(start: FewShotStart) -> None:
    read = fewshot_start_from_bytes(fewshot_start_to_bytes(start, b"the mean's code"), decode)
    assert read.adapter is MEAN
    for name in ("sizes", "rates", "slopes", "in_context", "tasks"):
        assert getattr(read, name) == getattr(start, name)


def test_the_same_start_gives_the_same_bytes() -> None:
    assert fewshot_start_to_bytes(start(), b"code") == fewshot_start_to_bytes(start(), b"code")


def test_damage_anywhere_is_refused() -> None:
    data = fewshot_start_to_bytes(start(), b"the mean's code")
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x40
        with pytest.raises(GeneratorError):
            fewshot_start_from_bytes(bytes(damaged), decode)


def test_a_file_that_is_cut_short_is_refused() -> None:
    data = fewshot_start_to_bytes(start(), b"the mean's code")
    for length in range(len(data)):
        with pytest.raises(GeneratorError):
            fewshot_start_from_bytes(data[:length], decode)


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": [1] * (MODULES - 1)},
        {"rates": [[2] * (MODULES + 1)]},
        {"rates": []},
        {"rates": [[2] * MODULES] * 65, "slopes": [4] * 65, "in_context": [1] * 65},
        {"slopes": [4, 4]},
        {"in_context": [1, 1]},
        {"sizes": [1.5] * MODULES},
        {"sizes": [True] * MODULES},
        {"sizes": [1025] * MODULES},
        {"sizes": None},
        {"rates": {"a": 1}},
        {"tasks": 0},
        {"tasks": 1.5},
        {"tasks": float("inf")},
        {"tasks": None},
    ],
    ids=str,
)
def test_a_head_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    assert fewshot_start_from_bytes(written(), decode).tasks == 6
    with pytest.raises(GeneratorError):
        fewshot_start_from_bytes(written(**changes), decode)


@pytest.mark.parametrize("head", [b"[]", b"3", b"", b"{", b"[" * 100_000, b" " * (1 << 23)])
def test_a_head_that_is_no_object_or_huge_is_refused(head: bytes) -> None:
    packed = zlib.compress(head)
    with pytest.raises(GeneratorError):
        fewshot_start_from_bytes(
            add_checksum(MAGIC + struct.pack("<I", len(packed)) + packed + b"the mean's code"), decode
        )


def test_a_length_of_the_head_beyond_the_file_is_refused() -> None:
    with pytest.raises(GeneratorError):
        fewshot_start_from_bytes(add_checksum(MAGIC + struct.pack("<I", 2**32 - 1) + b"head"), decode)


def test_the_mean_comes_back_as_its_code_says() -> None:
    under = codec()
    made = untrained_fewshot_start([make_adapter(1), make_adapter(2)])
    code = mean_code(made, under)
    read = fewshot_start_from_bytes(fewshot_start_to_bytes(made, code), under.decode)
    assert same(read.adapter, under.decode(code))
    assert [m.name for m in read.adapter.modules] == [m.name for m in made.adapter.modules]
    assert read.sizes == made.sizes


def test_a_mean_of_another_generator_is_refused() -> None:
    made = untrained_fewshot_start([make_adapter(1)])
    data = fewshot_start_to_bytes(made, mean_code(made, codec()))
    other = Codec.of(trained_file(sets=0))
    with pytest.raises(IcmLoraError, match="another generator"):
        fewshot_start_from_bytes(data, other.decode)


def test_a_mean_of_other_modules_is_refused() -> None:
    data = fewshot_start_to_bytes(replace(start(), sizes=(1,) * MODULES), b"code")
    with pytest.raises(GeneratorError, match="does not match its mean"):
        fewshot_start_from_bytes(data, lambda _: make_adapter(0, kinds=("q_proj",)))
