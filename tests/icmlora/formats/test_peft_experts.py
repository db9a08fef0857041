"""LoRA on fused experts and on grouped convolutions: split into plain modules, and written as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from icmlora.adapter.layout import ModuleShape
from icmlora.formats.format import Template
from icmlora.formats.peft.peft import PEFT
from icmlora.generator.config import kind_of

# PEFT applies these patterns and warns that it ignores them.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
EXPERTS, HIDDEN, INNER = 4, 6, 5


class Experts(nn.Module):
    """Fused experts as transformers declares them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))


class Block(nn.Module):
    """A layer with experts, their router and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Experts()


class Mixture(nn.Module):
    """Two layers; what they compute does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.config = {"model_type": "custom"}


def made_by_peft(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """Save an adapter with PEFT and return dW of each parameter as PEFT computes it, as (experts, rows, columns)."""
    torch.manual_seed(1)
    model = get_peft_model(Mixture(), LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **config}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(folder)
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            full = plain if parameter in (None, "weight") else f"{plain}.{parameter}"
            found[full] = module.get_delta_weight("default").detach()
    return found


def read(folder: Path) -> tuple[bytes, bytes]:
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


def assert_same_dw(folder: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    found = {module.name: module.b @ module.a for module in PEFT.read(*read(folder)).adapter.modules}
    for name, dw in wanted.items():
        if dw.dim() == 2:
            torch.testing.assert_close(found.pop(name), dw)
        else:
            for expert, values in enumerate(dw):
                torch.testing.assert_close(found.pop(f"{name}.{expert}"), values)
    assert not found


def assert_written_as_it_was(folder: Path) -> None:
    config, weights = read(folder)
    summary = PEFT.inspect(config, weights)
    assert summary.original_only is None
    adapter = PEFT.read(config, weights).adapter
    like = Template(config, summary.layout, summary.dtype, summary.template)
    (folder / "again.safetensors").write_bytes(PEFT.encode(adapter, card="", metadata={}, like=like).weights)
    before, after = load_file(folder / "adapter_model.safetensors"), load_file(folder / "again.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        torch.testing.assert_close(after[name], values)


BOTH = {"target_parameters": ["down_proj", "gate_up_proj"]}


@pytest.mark.parametrize(
    "config",
    [
        BOTH,
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["down_proj"]},
        {"target_modules": [], **BOTH},
        {**BOTH, "rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 6}},
        {"target_parameters": ["down_proj", "gate_up_proj", "gate.weight"], "rank_pattern": {r".*\.gate_up_proj": 4}},
        {**BOTH, "use_rslora": True, "rank_pattern": {"experts.down_proj": 1}},
        {**BOTH, "rank_pattern": {r"layers\.[1-9]\.experts\..*": 3, "q_proj": 5}},
    ],
    ids=["both", "one", "other", "experts only", "patterns", "all-linear", "rslora", "by layer"],
)
def test_fused_experts_are_read_as_peft_applies_them_and_written_as_they_were(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    assert_same_dw(tmp_path, made_by_peft(tmp_path, **config))
    assert_written_as_it_was(tmp_path)


def test_experts_are_named_after_the_parameter_and_grouped_by_layer(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    layout = PEFT.inspect(*read(tmp_path)).layout
    assert ModuleShape("layers.1.experts.down_proj.3", 2, INNER, HIDDEN) in layout
    kinds = {kind_of(shape) for shape in layout}
    assert {layer for _, layer in kinds} == {0, 1}
    assert len({kind.pattern for kind, _ in kinds}) == 1 + 2 * EXPERTS


def test_targets_name_the_parameters_and_not_every_expert(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    assert PEFT.inspect(*read(tmp_path)).target_modules == ("down_proj", "gate_up_proj", "q_proj")


def changed(folder: Path, **fields: object) -> str | None:
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    return PEFT.inspect(json.dumps(config).encode(), read(folder)[1]).original_only


def test_ranks_that_fit_no_parameter_leave_the_original_only(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    reason = changed(tmp_path, rank_pattern={"gate_up_proj": 3})
    assert reason is not None
    assert "fits its fused experts" in reason


def test_ranks_that_could_be_of_either_parameter_leave_the_original_only(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    reason = changed(tmp_path, target_parameters=["first", "second"], alpha_pattern={"first": 7})
    assert reason is not None
    assert "cannot be determined" in reason


@pytest.mark.parametrize("value", ["down_proj", [1], ["a b"], {"a": 1}])
def test_parameters_that_are_no_list_of_names_leave_the_original_only(tmp_path: Path, value: object) -> None:
    made_by_peft(tmp_path, **BOTH)
    assert "target_parameters" in str(changed(tmp_path, target_parameters=value))


def test_a_file_that_leaves_out_the_inner_parameter_is_kept_only(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: values for name, values in tensors.items() if ".0.experts.lora" not in name}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "does not contain" in str(changed(tmp_path))


def test_more_experts_than_a_model_has_leave_the_original_only(tmp_path: Path) -> None:
    made_by_peft(tmp_path, **BOTH)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for layer in range(2):
        prefix = f"base_model.model.layers.{layer}.experts.lora_"
        tensors |= {f"{prefix}A.weight": torch.ones(4098, 1), f"{prefix}B.weight": torch.ones(1, 4098)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert "fits its fused experts" in str(changed(tmp_path))


@given(experts=st.integers(1, 5), rank=st.integers(1, 4), inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_any_fused_factors_come_back_bit_for_bit(experts: int, rank: int, inputs: int, outputs: int) -> None:
    from icmlora.formats.peft.tensors import _split, joined

    a, b = torch.randn(experts * rank, inputs), torch.randn(outputs, experts * rank)
    parts = _split(a, b, experts, 1)
    for expert, (left, right) in enumerate(parts):
        assert torch.equal(left, a[expert * rank : (expert + 1) * rank])
        assert torch.equal(right, b[:, expert::experts])
    whole = joined(parts, experts=experts > 1)
    assert torch.equal(whole[0], a)
    assert torch.equal(whole[1], b)


class Convolutions(nn.Module):
    """A grouped convolution and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.plain = nn.Conv1d(4, 6, 3)
        self.config = {"model_type": "custom"}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_grouped_convolution_is_coded_by_group_and_written_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = get_peft_model(Convolutions(), LoraConfig(r=4, lora_alpha=2, target_modules=["grouped", "plain"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    modules = {module.name: module for module in PEFT.read(*read(tmp_path)).adapter.modules}
    assert modules.keys() == {"grouped.0", "grouped.1", "plain"}
    layer: Any = model.base_model.model.grouped
    images = torch.randn(1, 4, 3, 3)
    wanted = layer.lora_B["default"](layer.lora_A["default"](images)).flatten() * 0.5
    found = torch.cat([modules[f"grouped.{group}"].b @ modules[f"grouped.{group}"].a for group in range(2)])
    torch.testing.assert_close(found @ images.flatten(), wanted)
    assert_written_as_it_was(tmp_path)
