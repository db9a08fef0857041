"""References to tensors of a base model: what is equal comes back bit for bit, and nothing else passes for it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import BaseModelMismatch, DataError
from icmlora.formats.base_references import (
    REFERENCES,
    Reference,
    pack_references,
    parse_references,
    reference_to,
    resolve,
    widened,
)
from icmlora.formats.extras import unpack_tensors
from icmlora.io.safetensors import ITEM_BYTES, RawTensor

NAMES = st.from_regex(r"[A-Za-z0-9_.]{1,40}", fullmatch=True)
DIGESTS = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
SHAPES = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
RECORDS = st.builds(Reference, NAMES, st.sampled_from(sorted(ITEM_BYTES)), SHAPES, DIGESTS)


@dataclass
class Base:
    """A base model in memory."""

    tensors: dict[str, RawTensor]
    label: str = "acme/base"

    def read(self, name: str) -> RawTensor | None:
        return self.tensors.get(name)


def tensor(values: torch.Tensor) -> RawTensor:
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[values.dtype]
    return RawTensor(dtype, tuple(values.shape), values.reshape(-1).view(torch.uint8).numpy().tobytes())


ROWS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
BASE = Base({"embed.weight": tensor(ROWS)})


def reference(given_tensor: RawTensor) -> Reference | None:
    return reference_to("embed.weight", BASE, given_tensor)


@pytest.mark.slow
@given(st.dictionaries(NAMES, RECORDS, max_size=5))
def test_a_record_comes_back(references: dict[str, Reference]) -> None:
    assert parse_references(pack_references(references)) == references


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_equal_tensor_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    copy = tensor(ROWS.to(dtype))
    found = reference(copy)
    assert found is not None
    assert unpack_tensors([pack_references({"head.weight": found})], lambda: BASE) == {"head.weight": copy}


def test_widening_keeps_every_bit_of_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    bits = every.view(torch.int16).to(torch.int32) << 16
    wide = widened(tensor(every), "F32")
    assert wide is not None
    assert wide.data == bits.numpy().tobytes()


@pytest.mark.parametrize(
    "other",
    [
        tensor(ROWS + 1),
        tensor(ROWS.half()),
        tensor(ROWS.reshape(4, 6)),
        tensor(ROWS[:5]),
        tensor(ROWS.float() * (1 + 2**-20)),
    ],
)
def test_a_tensor_that_differs_is_not_equal(other: RawTensor) -> None:
    assert reference(other) is None


def test_a_tensor_that_the_base_model_does_not_have_is_not_equal() -> None:
    assert reference_to("other.weight", BASE, tensor(ROWS)) is None


@pytest.mark.parametrize("changed", [{}, {"embed.weight": tensor(ROWS + 1)}, {"embed.weight": tensor(ROWS[:5])}])
def test_another_base_model_is_an_error_that_names_it_and_the_way_out(changed: dict[str, RawTensor]) -> None:
    found = reference(tensor(ROWS))
    assert found is not None
    with pytest.raises(BaseModelMismatch, match="'acme/base'") as caught:
        resolve(pack_references({"head.weight": found}), replace(BASE, tensors=changed))
    assert "embed.weight" in caught.value.message
    assert "icm base add" in str(caught.value.hint)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DataError):
        parse_references(REFERENCES + b"\x00" + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=8) | NAMES, JSON | st.tuples(NAMES, NAMES, JSON, DIGESTS), min_size=1))
def test_a_record_is_read_as_it_would_be_written_or_refused(fields: dict[str, object]) -> None:
    try:
        found = parse_references(REFERENCES + json.dumps(fields).encode())
    except DataError:
        return
    assert parse_references(pack_references(found)) == found
    assert all(reference.dtype in ITEM_BYTES for reference in found.values())


GOOD = ["embed.weight", "BF16", [6, 4], "0" * 64]


@pytest.mark.parametrize(
    "fields",
    [
        {"head": GOOD[:3]},
        {"head": ["../embed", *GOOD[1:]]},
        {"he ad": GOOD},
        {"head": [*GOOD[:1], "F12", *GOOD[2:]]},
        {"head": [*GOOD[:2], [6, -4], GOOD[3]]},
        {"head": [*GOOD[:2], [6, True], GOOD[3]]},
        {"head": [*GOOD[:2], [2] * 9, GOOD[3]]},
        {"head": [*GOOD[:2], "64", GOOD[3]]},
        {"head": [*GOOD[:3], "0" * 63]},
        {"head": [*GOOD[:3], "Z" * 64]},
    ],
)
def test_a_record_with_a_bad_entry_is_refused(fields: dict[str, object]) -> None:
    assert parse_references(REFERENCES + json.dumps({"head": GOOD}).encode())
    with pytest.raises(DataError, match="cannot be read"):
        parse_references(REFERENCES + json.dumps(fields).encode())


def test_a_name_that_occurs_twice_is_refused() -> None:
    entry = f'"head":{json.dumps(GOOD)}'
    with pytest.raises(DataError, match="twice"):
        parse_references(REFERENCES + f"{{{entry},{entry}}}".encode())
