"""The generator file: the same bytes for the same network, and nothing else is opened."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import pytest
import torch

from icmlora.errors import GeneratorError
from icmlora.generator import generator_file
from icmlora.generator.generator_file import generator_from_bytes, generator_to_bytes
from icmlora.torch_tensors import decode_torch, encode_torch
from tests.icmlora.small_fleet import codec, trained_file


def rewritten(header: dict[str, str] | None = None, drop: str = "", **config: object) -> bytes:
    """Return the trained file with another header or without a tensor."""
    stored, tensors = decode_torch(trained_file())
    stored["config"] = json.dumps(json.loads(stored["config"]) | config)
    tensors.pop(drop, None)
    return encode_torch(tensors, {**stored, **(header or {})}, dtype="bfloat16")


def test_a_network_as_read_back_is_written_as_the_same_bytes() -> None:
    generator = generator_from_bytes(trained_file())
    assert generator_to_bytes(generator.net) == trained_file()
    assert generator.digest == hashlib.sha256(trained_file()).hexdigest()


def test_notes_are_kept_and_cannot_replace_what_the_file_says_of_itself() -> None:
    header, _ = decode_torch(generator_to_bytes(codec().generator.net, {"seed": "7", "format": "other"}))
    assert (header["seed"], header["format"]) == ("7", generator_file.FORMAT)


def test_opening_a_generator_leaves_the_global_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    generator_from_bytes(trained_file())
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("data", [b"", b"not a file", trained_file()[:-1], trained_file() + b"\0"])
def test_bytes_that_are_no_whole_file_are_refused(data: bytes) -> None:
    with pytest.raises(GeneratorError, match="not a whole generator file"):
        generator_from_bytes(data)


def test_a_file_of_another_format_is_refused() -> None:
    for header in ({"format": "icm generator 2"}, {"format": "pt"}):
        with pytest.raises(GeneratorError, match="another format"):
            generator_from_bytes(rewritten(header))


def test_a_file_made_under_other_coding_tables_is_refused() -> None:
    with pytest.raises(GeneratorError, match="coding tables") as caught:
        generator_from_bytes(rewritten({"tables": "0" * 64}))
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"layers": 3}, {"width": 40}, {"condition_size": 0}, {"slots": 1}, {"sketch": 2.5}])
def test_a_file_whose_tensors_are_not_its_configurations_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(GeneratorError, match="tensors"):
        generator_from_bytes(rewritten(**change))


def test_a_file_without_one_of_its_tensors_is_refused() -> None:
    with pytest.raises(GeneratorError, match="tensors"):
        generator_from_bytes(rewritten(drop="prior.weight"))


def test_a_file_without_a_configuration_is_refused() -> None:
    with pytest.raises(GeneratorError, match="configuration"):
        generator_from_bytes(rewritten({"config": ""}))


def test_a_configuration_that_claims_a_huge_network_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(GeneratorError, match="tensors"):
            generator_from_bytes(rewritten(layers=10**9, embedding=10**6, width=10**6))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_with_a_value_that_is_not_finite_is_refused() -> None:
    data = bytearray(trained_file())
    data[-2:] = b"\x80\x7f"  # infinity in bfloat16
    with pytest.raises(GeneratorError, match="not finite"):
        generator_from_bytes(bytes(data))


def test_a_network_that_diverged_is_not_written() -> None:
    net = codec().generator.net
    with torch.no_grad():
        net.prior.bias[0] = torch.nan
    with pytest.raises(GeneratorError, match="diverged"):
        generator_to_bytes(net)
