"""Putting an adapter on the base model and taking it off again."""

from __future__ import annotations

import json
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.attach import adapted
from icmlora.errors import BaseModelMismatch
from tests.icmlora.tiny_base import load_tiny_base, write_tiny_adapter

IDS = torch.arange(1, 20)[None]


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return load_tiny_base(tmp_path / "base")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=IDS).logits
    return output


def test_the_adapter_changes_what_the_model_says(base: BaseModel, folder: Path) -> None:
    before = logits(base.model)
    with adapted(base, folder) as model:
        assert not torch.allclose(logits(model), before, atol=1e-2)


def test_afterwards_the_model_is_bit_for_bit_what_it_was(base: BaseModel, folder: Path) -> None:
    before, said = {name: value.clone() for name, value in base.model.state_dict().items()}, logits(base.model)
    with adapted(base, folder) as model:
        logits(model)
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(base.model), said)


def test_an_error_inside_the_block_takes_the_adapter_off_too(base: BaseModel, folder: Path) -> None:
    names = list(base.model.state_dict())
    with pytest.raises(ZeroDivisionError), adapted(base, folder):
        raise ZeroDivisionError
    assert list(base.model.state_dict()) == names


def test_adapters_can_follow_one_another_without_mixing(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other", seed=2)
    with adapted(base, other) as model:
        alone = logits(model)
    with adapted(base, folder):
        pass
    with adapted(base, other) as model:
        assert torch.equal(logits(model), alone)


def test_the_adapted_model_drops_nothing_at_random(base: BaseModel, folder: Path) -> None:
    with adapted(base, folder) as model:
        assert not any(module.training for module in model.modules())


def test_neither_warnings_nor_the_network_are_needed(
    base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was touched")

    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "maker/model"}))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapted(base, folder):
            pass


def test_an_adapter_of_another_size_is_refused_and_leaves_the_model_as_it_was(base: BaseModel, tmp_path: Path) -> None:
    names, said = list(base.model.state_dict()), logits(base.model)
    wide = write_tiny_adapter(tmp_path / "wide", hidden=64)
    with pytest.raises(BaseModelMismatch, match="cannot be applied to base model"), adapted(base, wide):
        pass
    assert list(base.model.state_dict()) == names
    assert torch.equal(logits(base.model), said)


def test_a_tensor_that_matches_nothing_is_refused_by_name(base: BaseModel, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)
    save_file(tensors, file)
    with pytest.raises(BaseModelMismatch, match=r"layers\.9"), adapted(base, folder):
        pass


def test_a_tensor_that_the_file_lacks_is_refused_by_name(base: BaseModel, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(BaseModelMismatch, match="only in the adapted model"), adapted(base, folder):
        pass
    assert not any("lora" in key for key in base.model.state_dict())
