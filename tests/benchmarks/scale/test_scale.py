"""The synthetic 8B adapter is what it is said to be, and codes of it come back bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.model import Adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter, measured
from icmlora.generator.files.network_file import generator_to_bytes
from tests.benchmarks.scale.large import LAYERS, RANK, make_adapter, make_network, shapes, spectra_of
from tests.benchmarks.scale.small import measure_tasks, trained_codec
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.small_fleet import make_adapter as make_small, same

SPECTRA = [2.0 ** -torch.arange(float(RANK)), 3.0 * 1.5 ** -torch.arange(float(RANK))]


@cache
def shrunk() -> Adapter:
    return make_adapter(shapes(layers=2, shrink=32), SPECTRA)


@cache
def code() -> tuple[Codec, bytes]:
    codec = Codec.of(generator_to_bytes(make_network(shrunk())))
    return codec, encode_adapter(codec, shrunk(), {}).data


def test_the_adapter_has_the_size_of_rank_16_on_all_linear_modules_of_llama_3_8b() -> None:
    assert len(shapes()) == 7 * LAYERS
    assert sum(shape.parameters for shape in shapes()) == 41_943_040


def test_modules_have_the_given_singular_values_in_turn() -> None:
    modules = {module.name: module for module in canonicalize(shrunk()).modules}
    for number, shape in enumerate(shapes(layers=2, shrink=32)):
        found = modules[shape.module].a.square().sum(1)
        torch.testing.assert_close(found, SPECTRA[number % 2], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_adapter() -> None:
    assert same(shrunk(), make_adapter(shapes(layers=2, shrink=32), SPECTRA))
    assert not same(shrunk(), make_adapter(shapes(layers=2, shrink=32), SPECTRA, seed=1))


def test_spectra_are_taken_from_the_adapters_of_that_rank(tmp_path: Path) -> None:
    write_lora(tmp_path / "wide", seed=0, rank=RANK)
    write_lora(tmp_path / "narrow", seed=1, rank=2)
    spectra = spectra_of(tmp_path)
    assert spectra
    assert all(len(values) == RANK for values in spectra)


def test_a_code_comes_back_within_its_tolerance() -> None:
    codec, data = code()
    assert measured(codec, shrunk(), data).weighted_error <= codec.config.tolerance


def test_decoding_gives_the_same_bits_again_and_from_the_generator_opened_anew() -> None:
    codec, data = code()
    again = Codec.of(generator_to_bytes(make_network(shrunk())))
    assert same(codec.decode(data), codec.decode(data))
    assert same(codec.decode(data), again.decode(data))


def test_opened_integers_are_written_as_the_same_bytes() -> None:
    codec, data = code()
    opened = codec.open(data)
    assert codec.close(opened.head, opened.groups) == data


def test_every_task_is_timed() -> None:
    adapters = {f"task-{seed}": make_small(seed) for seed in range(3)}
    found = measure_tasks(trained_codec(list(adapters.values()), {}, steps=2), adapters, runs=3)
    assert [each["task"] for each in found] == list(adapters)
    assert all(0 < each["decode_ms"]["least"] <= each["decode_ms"]["median"] for each in found)
    assert found[0]["code_bytes"] == pytest.approx(found[1]["code_bytes"], rel=0.5)
