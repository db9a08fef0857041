"""The generator file: the same bytes for the same network, and nothing else is opened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import GeneratorError
from icmlora.generator.files.container import add_checksum
from icmlora.generator.files.file import MAGIC
from icmlora.generator.files.network_file import generator_to_bytes, network_from_bytes
from tests.icmlora.small_fleet import codec, trained_file


def parts(data: bytes | None = None) -> tuple[dict[str, str], bytes]:
    """Return header and words of a file, else of the trained one."""
    data = data or trained_file()
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    start = len(MAGIC) + 4
    return json.loads(zlib.decompress(data[start : start + length])), data[start + length : -8]


def rewritten(header: dict[str, str] | None = None, words: bytes | None = None, **config: object) -> bytes:
    """Return the trained file with another header or other words, and with the check that fits."""
    stored, present = parts()
    stored["config"] = json.dumps(json.loads(stored["config"]) | config)
    packed = zlib.compress(json.dumps({**stored, **(header or {})}).encode())
    data = MAGIC + struct.pack("<I", len(packed)) + packed + (present if words is None else words)
    return add_checksum(data)


def test_the_same_network_is_written_as_the_same_bytes() -> None:
    net = codec().net
    assert generator_to_bytes(net) == generator_to_bytes(net)
    assert codec().digest == hashlib.sha256(trained_file()).hexdigest()


def test_a_generator_takes_about_half_a_byte_per_parameter() -> None:
    values = sum(tensor.numel() for tensor in codec().net.state_dict().values())
    assert len(parts()[1]) < 0.6 * values


def test_notes_are_kept_and_cannot_replace_what_the_file_says_of_itself() -> None:
    header, _ = parts(generator_to_bytes(codec().net, {"seed": "7", "config": "other"}))
    assert header["seed"] == "7"
    assert json.loads(header["config"])["base_model"]


def test_opening_a_generator_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    network_from_bytes(trained_file())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("data", [b"", b"not a file", trained_file()[:-1], trained_file() + b"\0"])
def test_bytes_that_are_no_whole_file_are_refused(data: bytes) -> None:
    with pytest.raises(GeneratorError, match=r"not a generator file|damaged"):
        network_from_bytes(data)


@given(place=st.integers(0, len(trained_file()) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_refused(place: int, bit: int) -> None:
    data = bytearray(trained_file())
    data[place] ^= 1 << bit
    with pytest.raises(GeneratorError):
        network_from_bytes(bytes(data))


def test_a_file_made_under_other_coding_tables_is_refused() -> None:
    with pytest.raises(GeneratorError, match="coding tables") as caught:
        network_from_bytes(rewritten({"tables": "0" * 64}))
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"layers": 3}, {"width": 40}, {"condition_size": 0}, {"slots": 1}, {"sketch": 2.5}])
def test_a_file_whose_parameters_are_not_its_configurations_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GeneratorError, match="parameters"):
        network_from_bytes(rewritten(**change))


@given(words=st.binary(max_size=4000))
def test_any_words_are_a_network_or_refused(words: bytes) -> None:
    with contextlib.suppress(GeneratorError):
        net = network_from_bytes(rewritten(words=words))
        assert net.config == codec().config


def test_a_file_without_a_configuration_is_refused() -> None:
    with pytest.raises(GeneratorError, match="configuration"):
        network_from_bytes(rewritten({"config": ""}))


def test_a_configuration_that_claims_a_huge_network_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(GeneratorError, match="parameters"):
            network_from_bytes(rewritten(layers=10**9, embedding=10**6, width=10**6))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_network_that_diverged_is_not_written() -> None:
    net = codec().net
    with torch.no_grad():
        net.prior.bias[0] = torch.nan
    with pytest.raises(GeneratorError, match="diverged"):
        generator_to_bytes(net)
