"""Generator files of several versions: they grow at their end, and earlier versions stay bit for bit."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import struct
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from icmlora.errors import CodeError, GeneratorError, NotCovered
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.generator_file import GeneratorFile
from icmlora.generator.files.container import CHECKSUM_SIZE, add_checksum
from icmlora.generator.files.file import MAGIC_OF_VERSIONS, append_version, versions_of
from icmlora.generator.files.network_file import WEIGHTS, generator_to_bytes
from icmlora.generator.files.version_delta import differences_to_words, words_to_changed
from icmlora.training.config import TrainConfig
from icmlora.training.initialisation import fresh_network, tunable_network
from icmlora.training.loop import fit
from icmlora.training.state import new_state
from tests.icmlora.small_fleet import (
    MemoryAdapterSource,
    codec,
    make_adapter,
    make_vectors,
    mixed_fleet,
    same,
    trained_file,
)

Tensors = dict[str, torch.Tensor]


@cache
def differences(seed: int) -> bytes:
    """Return a version of random differences to the trained network."""
    draw = torch.Generator().manual_seed(seed)
    before = codec().net.state_dict()
    changed = {name: value + 0.02 * torch.randn(value.shape, generator=draw) for name, value in before.items()}
    return differences_to_words(before, changed, 2.0)


@cache
def other_network() -> bytes:
    """Return the file of a network for a module that the trained one does not know."""
    fleet = MemoryAdapterSource([[make_adapter(7, rank=8, kinds=("v_proj",))]], sets=0)
    return generator_to_bytes(fresh_network(fleet.config(), fleet, 0))


def grown(choices: Sequence[tuple[bool, int]]) -> list[bytes]:
    """Return the file after each version; per version whether it is a network of its own, else to which it differs."""
    files = [trained_file()]
    networks = [0]  # versions that have the trained network's shapes
    for is_network, choice in choices:
        if is_network:
            files.append(append_version(files[-1], other_network(), None))
        else:
            base = networks[choice % len(networks)]
            networks.append(len(files))
            files.append(append_version(files[-1], differences(choice), base))
    return files


@cache
def three() -> bytes:
    return grown([(False, 1), (True, 0)])[-1]


def code_of(number: int, data: bytes) -> bytes:
    return encode_adapter(GeneratorFile(data).codec(number), make_adapter(1, rank=4), make_vectors(1)).data


@given(choices=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=4))
def test_every_version_is_called_by_the_file_that_it_was_the_last_of(choices: list[tuple[bool, int]]) -> None:
    files = grown(choices)
    assert GeneratorFile(files[-1]).digests == tuple(hashlib.sha256(data).hexdigest() for data in files)


@given(choices=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_file_begins_with_each_file_that_it_grew_from(choices: list[tuple[bool, int]]) -> None:
    first, *later = grown(choices)
    assert versions_of(later[-1])[0].content == first
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(later))


@given(choices=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_every_version_gives_the_same_network_however_the_file_grows(choices: list[tuple[bool, int]]) -> None:
    files = grown(choices)
    longest = GeneratorFile(files[-1])
    for number, data in enumerate(files):
        earlier, later = (one.codec(number).net.state_dict() for one in (GeneratorFile(data), longest))
        assert all(torch.equal(earlier[name], later[name]) for name in earlier)


def test_a_code_decodes_bit_for_bit_under_every_later_file() -> None:
    files = grown([(False, 1), (True, 0), (False, 2)])
    for number in (0, 1, 3):
        code = code_of(number, files[number])
        decoded = [GeneratorFile(data).codec_of(code).decode(code) for data in files[number:]]
        assert all(same(decoded[0], adapter) for adapter in decoded)


def test_a_code_of_a_later_version_is_refused_by_an_earlier_file() -> None:
    files = grown([(False, 1)])
    with pytest.raises(CodeError, match="belongs to generator"):
        GeneratorFile(files[0]).codec_of(code_of(1, files[1]))


def test_a_file_that_never_grew_has_one_version() -> None:
    generator_file = GeneratorFile(trained_file())
    assert generator_file.digests == (codec().digest,)
    assert generator_file.configs == (codec().config,)


def test_an_adapter_is_covered_by_the_versions_that_have_its_modules() -> None:
    generator_file = GeneratorFile(three())
    assert generator_file.covering(make_adapter(1).layout) == [0, 1]
    assert generator_file.covering(make_adapter(1, rank=8, kinds=("v_proj",)).layout) == [2]
    assert generator_file.codec_for(make_adapter(1).layout).digest == generator_file.digests[1]
    with pytest.raises(NotCovered):
        generator_file.codec_for(make_adapter(1, rank=8).layout)


@given(place=st.integers(0, len(three()) - 1), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_refused(place: int, bit: int) -> None:
    data = bytearray(three())
    data[place] ^= 1 << bit
    with pytest.raises(GeneratorError):
        versions_of(bytes(data))


@given(end=st.integers(0, len(three()) - 1))
def test_a_file_that_is_cut_short_is_refused_or_the_file_that_it_grew_from(end: int) -> None:
    earlier = grown([(False, 1)])[-1]
    with contextlib.suppress(GeneratorError):
        versions_of(three()[:end])
        assert three()[:end] == earlier


@given(words=st.binary(max_size=2000))
def test_any_differences_are_a_network_or_refused(words: bytes) -> None:
    with contextlib.suppress(GeneratorError):
        assert GeneratorFile(append_version(trained_file(), words, 0)).codec(1).config == codec().config


def framed(kind: int, base: int, content: bytes, before: bytes | None = None) -> bytes:
    return add_checksum((before or grown([(False, 1)])[-1]) + struct.pack("<BHI", kind, base, len(content)) + content)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (framed(1, 2, differences(1)), "later one"),
        (framed(1, 9, differences(1)), "later one"),
        (framed(2, 0, differences(1)), "newer kind"),
        (framed(0, 1, trained_file()), "malformed frame"),
        (framed(0, 0, b"no network"), "not an icm generator"),
        (framed(0, 0, trained_file(), MAGIC_OF_VERSIONS), "damaged"),
        (MAGIC_OF_VERSIONS, "damaged"),
        (grown([(False, 1)])[-1] + b"\0", "damaged"),
    ],
    ids=["its own base", "a later base", "a newer kind", "a network with a base", "no network", "one version", "none",
         "bytes after it"],
)  # fmt: skip
def test_versions_that_nothing_writes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(GeneratorError, match=message):
        versions_of(data)


def test_a_version_of_another_base_model_is_refused() -> None:
    net = copy.deepcopy(codec().net)
    object.__setattr__(net.config, "base_model", "another/base")
    with pytest.raises(GeneratorError, match="different base models"):
        versions_of(append_version(trained_file(), generator_to_bytes(net), None))


def tensors() -> Tensors:
    return codec().net.state_dict()


def test_differences_come_back_within_half_a_step() -> None:
    before, draw = tensors(), torch.Generator().manual_seed(3)
    after = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in before.items()}
    found = words_to_changed(differences_to_words(before, after, 0.5), before)
    for name, value in found.items():
        if name.startswith(WEIGHTS):
            assert torch.equal(value, before[name])
        else:
            size = float((after[name] - before[name]).double().square().mean().sqrt())
            assert float((value - after[name]).abs().max()) <= max(0.26 * size, 0.063) * 1.05


def test_a_network_that_did_not_change_takes_next_to_nothing() -> None:
    assert len(differences_to_words(tensors(), tensors(), 2.0)) < 100


def test_differences_that_are_no_numbers_are_not_written() -> None:
    after = tensors() | {"mix.bias": torch.full_like(tensors()["mix.bias"], torch.nan)}
    with pytest.raises(GeneratorError, match="diverged"):
        differences_to_words(tensors(), after, 2.0)


def test_tuning_changes_the_decoder_alone() -> None:
    before = codec().net
    state = new_state(tunable_network(before), TrainConfig(steps=3, weight_decay=0.0))
    for _ in fit(state, mixed_fleet()):
        pass
    after = state.net.state_dict()
    changed = {name.partition(".")[0] for name, value in before.state_dict().items() if not value.equal(after[name])}
    assert {"directions", "spread"} <= changed
    assert not changed & {"condition", "encoder", "prior"}
    assert not [name for name in changed if name.startswith(WEIGHTS)]


def test_the_check_of_a_version_covers_all_before_it() -> None:
    data = three()
    assert data[-CHECKSUM_SIZE:] == hashlib.sha256(data[:-CHECKSUM_SIZE]).digest()[:CHECKSUM_SIZE]
