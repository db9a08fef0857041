"""Initial weights are taken off adapters that changed their base model, as PEFT does it with the model loaded."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from icmlora.errors import AdapterRefused
from icmlora.formats.peft.initial import convert
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME, PeftFormat
from tests.icmlora import adapter_files


class Tiny(nn.Module):
    """Two linear layers, an embedding and a layer that holds its weight transposed, as GPT-2's do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 12)
        self.up, self.down, self.turned = nn.Linear(12, 16), nn.Linear(16, 12), Conv1D(10, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (n, 10)."""
        return self.turned(self.down(torch.relu(self.up(x + self.words.weight[:1]))))


X = torch.linspace(-1, 1, 36).reshape(3, 12)


def base() -> Tiny:
    """Return the same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Tiny()


def trained(folder: Path, *, dtype: str = "float32", **options: Any) -> torch.Tensor:
    """Save an adapter, its initial weights and PEFT's conversion; return what the trained model computes."""
    init = options.setdefault("init_lora_weights", "pissa")
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]} | options)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(base(), config)
        _round(model, dtype)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = init
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        _round(model, dtype)
        model.save_pretrained(folder / "adapter")
        output = model(X).detach()
        model.save_pretrained(folder / "by-peft", path_initial_model_for_weight_conversion=str(folder / "start"))
    return output


def _round(model: nn.Module, dtype: str) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def files(folder: Path) -> tuple[bytes, bytes]:
    """Return configuration and weights."""
    return (folder / CONFIG_NAME).read_bytes(), (folder / WEIGHTS_NAME).read_bytes()


def converted(folder: Path) -> tuple[bytes, bytes]:
    """Return what icm makes of an adapter and its initial weights."""
    return convert(*files(folder / "adapter"), files(folder / "start")[1])


def _in_order(config: bytes, weights: bytes) -> tuple[str, bytes]:
    """Return both with the modules' names sorted: PEFT holds them as a set and writes them in an order of chance."""
    settings = json.loads(config)
    return json.dumps(settings | {"target_modules": sorted(settings["target_modules"])}), weights


CONFIGURATIONS = [
    {},
    {"init_lora_weights": "pissa_niter_3"},
    {"init_lora_weights": "olora"},
    {"use_rslora": True},
    {"rank_pattern": {"down": 2}, "alpha_pattern": {"up": 9}},
    {"target_modules": ["up", "turned"], "fan_in_fan_out": False},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_the_files_are_those_that_peft_writes(tmp_path: Path, options: dict[str, Any]) -> None:
    trained(tmp_path, **options)
    assert _in_order(*converted(tmp_path)) == _in_order(*files(tmp_path / "by-peft"))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_on_the_unchanged_base_model_it_computes_what_the_trained_model_did(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    expected = trained(tmp_path, **options)
    (tmp_path / "new").mkdir()
    for name, data in zip((CONFIG_NAME, WEIGHTS_NAME), converted(tmp_path), strict=True):
        (tmp_path / "new" / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base(), tmp_path / "new")
    torch.testing.assert_close(model(X), expected, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_adapter_is_converted_without_rounding(tmp_path: Path) -> None:
    trained(tmp_path)
    for name in ("adapter", "start"):
        tensors = {key: value.bfloat16() for key, value in load_file(tmp_path / name / WEIGHTS_NAME).items()}
        (tmp_path / name / WEIGHTS_NAME).write_bytes(adapter_files.weights(tensors, "bfloat16"))
    found = PeftFormat().read(*files(tmp_path / "adapter"), initial=files(tmp_path / "start")[1]).adapter
    own, start = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("adapter", "start"))
    for module in found.modules:
        a, b = (f"base_model.model.{module.name}.lora_{half}.weight" for half in "AB")
        expected = 5 / 3 * (own[b].float() @ own[a].float() - start[b].float() @ start[a].float())
        torch.testing.assert_close(module.b @ module.a, expected)


def test_a_head_is_kept_in_addition(tmp_path: Path) -> None:
    trained(tmp_path, modules_to_save=["turned"])
    config, weights = files(tmp_path / "adapter")
    initial = files(tmp_path / "start")[1]
    summary = PeftFormat().inspect(config, weights, initial=initial)
    assert [extra.name for extra in summary.extras] == [
        "base_model.model.turned.bias",
        "base_model.model.turned.weight",
    ]
    assert summary.extras[0] in _infos(weights)
    assert summary.rank_max == 6


def _infos(weights: bytes) -> tuple[Any, ...]:
    from icmlora.io.safetensors import read_header

    return read_header(weights).tensors


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"use_rslora": True, "rank_pattern": {"up": 2}}, "PEFT does not convert"),
        ({"target_parameters": ["experts.gate"]}, "fused experts"),
    ],
)
def test_what_peft_does_not_convert_is_refused(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    trained(tmp_path)
    config, weights = files(tmp_path / "adapter")
    config = json.dumps({**json.loads(config), **fields}).encode()
    with pytest.raises(AdapterRefused, match=why):
        convert(config, weights, files(tmp_path / "start")[1])


def test_initial_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "one")
    trained(tmp_path / "other", target_modules=["up"])
    with pytest.raises(AdapterRefused, match="modules, shapes or number formats"):
        convert(*files(tmp_path / "one" / "adapter"), files(tmp_path / "other" / "start")[1])


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    plain = copy.deepcopy(base())
    config = peft.LoraConfig(r=2, target_modules=["words"])
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "words")
    _, weights = files(tmp_path / "words")
    with pytest.raises(AdapterRefused, match="not a linear layer"):
        convert(files(tmp_path / "words")[0], weights, weights)
