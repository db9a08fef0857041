"""The check runs every stage that touches a device, on a base model of the sizes that it names."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from icmlora import Fleet
from tests.benchmarks.gpu_check import __main__ as gpu_check
from tests.benchmarks.gpu_check.stage import STAGES, Clock
from tests.benchmarks.gpu_check.subject import SHAPES, write_base
from tests.benchmarks.scale.large import shapes


def here(name: str, device: str, store: Path, **options: Any) -> dict[str, Any]:
    """Run a stage in this process."""
    clock = Clock()
    found = STAGES[name](Fleet(store, on_event=clock.listen), device, **options)
    return {"seconds": 0.0, "seconds_each": clock.each(), "host_bytes": 0, **found}


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(gpu_check, "stage", here)
    options = argparse.Namespace(device="cpu", fleet=None, base=None, shape="tiny", steps=4, refine=2, episodes=2)
    return gpu_check.check(tmp_path, options)


@pytest.mark.slow
def test_every_stage_runs_and_two_runs_on_the_cpu_agree(section: dict[str, Any]) -> None:
    assert section["stages"].keys() == STAGES.keys()
    assert all(part["within"] for part in section["compared"].values())
    text = gpu_check.report({"card": None, "note": "no card", **section}, with_goals=False)
    assert "goal" not in text
    assert len(text.splitlines()) == 1 + len(STAGES) + 1 + len(section["compared"])


@pytest.mark.parametrize(("shape", "billions"), [("8b", 8.03), ("0.3b", 0.285)])
def test_the_base_models_have_the_parameters_that_their_names_say(shape: str, billions: float) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPES[shape].config())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_base_that_is_written_layer_by_layer_loads_whole(tmp_path: Path) -> None:
    parameters = write_base(tmp_path / "base", SHAPES["tiny"])
    model, report = LlamaForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True, dtype=torch.bfloat16)
    assert not report["missing_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_its_8b_shapes_are_those_of_the_other_benchmarks() -> None:
    config = SHAPES["8b"].config()
    sizes = {shape.module.rpartition(".")[2]: (shape.inputs, shape.outputs) for shape in shapes()}
    assert sizes["down_proj"] == (config.intermediate_size, config.hidden_size)
    assert sizes["k_proj"] == (config.hidden_size, config.hidden_size * config.num_key_value_heads // 32)
