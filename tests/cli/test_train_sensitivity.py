"""What `icm train` learns of the base model: which channels matter, if the base model is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora.generator.files.network_file import network_from_bytes
from icmlora.generator.sensitivity import Sensitivity
from registry.store import Store
from tests.cli.coded import current
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
TRAIN = ("train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS)


def weights(store: Path) -> Sensitivity:
    with Store.open(store, read_only=True) as opened:
        return network_from_bytes(opened.blobs.read(current(store).blob)).sensitivity


def is_even(sensitivity: Sensitivity) -> bool:
    return all(bool((part == 0).all()) for part in (*sensitivity.inputs, *sensitivity.outputs))


def same(left: Sensitivity, right: Sensitivity) -> bool:
    pairs = zip((*left.inputs, *left.outputs), (*right.inputs, *right.outputs), strict=True)
    return all(one.equal(other) for one, other in pairs)


def test_the_channels_of_a_base_model_that_is_there_are_weighted(trained: Path) -> None:
    assert not is_even(weights(trained))


@pytest.mark.slow
def test_without_the_base_model_all_channels_count_the_same(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    assert icm("base", "rm", LABEL).code == 0
    assert icm(*TRAIN).code == 0
    assert is_even(weights(mixed))


def test_training_on_keeps_the_weights(icm: Icm, trained: Path) -> None:
    before = weights(trained)
    assert icm("base", "rm", LABEL).code == 0
    assert icm(*TRAIN).code == 0
    assert same(weights(trained), before)


@pytest.mark.slow
def test_modules_of_one_name_and_two_widths_are_trained_on(icm: Icm, trained: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "wide", seed=8)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert icm("ingest", folder, "--no-vectors").code in (0, 3)
    done = icm(*TRAIN, "--json")
    assert done.code == 0, done.err
    assert len(weights(trained).outputs) > 0
