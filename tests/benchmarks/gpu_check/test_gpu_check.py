"""The check runs every stage that touches a device, on a base model of the sizes that it names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from icmlora import Fleet
from tests.benchmarks.gpu_check import __main__ as gpu_check
from tests.benchmarks.gpu_check.child import StageFailed, no_stand_in
from tests.benchmarks.gpu_check.stage import STAGES, Clock
from tests.benchmarks.gpu_check.subject import SHAPES, write_base
from tests.benchmarks.scale.large import shapes

TINY = argparse.Namespace(device="cpu", fleet=None, base=None, shape="tiny", steps=4, refine=2, episodes=2)


def here(name: str, device: str, store: Path, **options: Any) -> dict[str, Any]:
    """Run a stage in this process."""
    clock = Clock()
    found = STAGES[name](Fleet(store, on_event=clock.listen), device, **options)
    return {"seconds": 0.0, "seconds_each": clock.each(), "host_bytes": 0, **found}


@pytest.mark.slow
def test_every_stage_runs_and_two_runs_on_the_cpu_agree(tmp_path: Path) -> None:
    section = gpu_check.check(tmp_path, TINY, here)
    assert section["stages"].keys() == STAGES.keys()
    assert all(part["within"] for part in section["compared"].values())
    text = gpu_check.report({"card": None, "note": "no card", **section}, with_goals=False)
    assert "goal" not in text
    assert len(text.splitlines()) == 1 + len(STAGES) + 2 + len(section["compared"])


def test_what_was_measured_before_a_stage_failed_stays_beside_the_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *_: object, **__: object) -> dict[str, Any]:
        if name == "encode":
            raise StageFailed("stage encode on cpu failed")
        return {"seconds": 1.0, "card": None}

    file = tmp_path / "cuda.json"
    file.write_text(json.dumps({"CPU, tiny": "an earlier run"}))
    monkeypatch.setattr(gpu_check, "RESULT", file)
    with pytest.raises(StageFailed):
        gpu_check.measure(argparse.Namespace(**vars(TINY), work=tmp_path), "none", run)
    document = json.loads(file.read_text())
    assert document["CPU, tiny"] == "an earlier run"
    assert document["CPU, tiny, unfinished"]["stages"].keys() == {"vectors", "train"}


def test_a_finished_run_replaces_what_was_kept_while_it_ran(tmp_path: Path) -> None:
    file = tmp_path / "cuda.json"
    for part in ("a", "b"):
        gpu_check.keep(file, "H100, 8b, unfinished", {"stages": part})
    gpu_check.keep(file, "H100, 8b", {"stages": "c"}, instead_of="H100, 8b, unfinished")
    assert json.loads(file.read_text()) == {"H100, 8b": {"stages": "c"}}


def test_without_a_compiler_the_rehearsal_says_so_and_the_check_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.rehearse(argparse.Namespace(device="cpu", work=tmp_path)).startswith("none: ")


@pytest.mark.slow
def test_the_rehearsal_runs_every_stage_on_the_stand_in_for_a_card(tmp_path: Path) -> None:
    if reason := no_stand_in():
        pytest.skip(reason)
    assert gpu_check.rehearse(argparse.Namespace(device="cpu", work=tmp_path)) == "on the stand-in for a card"


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
