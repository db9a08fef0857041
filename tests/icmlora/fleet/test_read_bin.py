"""`Fleet.ingest(read_bin=True)`: adapters whose weights are a pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icmlora import Fleet, UnsafeInput, load_adapter
from tests.cli.tiny_fleet import write_lora

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def new(tmp_path: Path) -> Fleet:
    """A fleet without a store."""
    return Fleet(tmp_path / "new")


class RunsCommand:
    """Unpickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def pickle_weights(folder: Path) -> Path:
    """Save the adapter of a folder as older versions of PEFT did."""
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.slow
def test_a_pickled_adapter_is_kept_as_safetensors(new: Fleet, tmp_path: Path) -> None:
    before = load_file(write_lora(tmp_path / "a" / "odes") / WEIGHTS)
    pickle_weights(tmp_path / "a" / "odes")
    (task,) = new.ingest([tmp_path / "a"], read_bin=True).done
    assert (task.task, task.status, task.converted_from, task.original_only) == (
        "odes",
        "added",
        "adapter_model.bin",
        None,
    )
    new.materialize("odes", tmp_path / "out", source="original")
    after = load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert load_adapter(tmp_path / "out").modules


@pytest.mark.slow
def test_ingesting_a_pickle_again_changes_nothing(new: Fleet, tmp_path: Path) -> None:
    pickle_weights(write_lora(tmp_path / "a" / "odes"))
    new.ingest([tmp_path / "a"], read_bin=True)
    report = new.ingest([tmp_path / "a"], read_bin=True)
    assert [(task.task, task.status) for task in report.done] == [("odes", "known")]


@pytest.mark.slow
def test_a_dry_run_converts_and_stores_nothing(new: Fleet, tmp_path: Path) -> None:
    pickle_weights(write_lora(tmp_path / "odes"))
    report = new.ingest([tmp_path / "odes"], read_bin=True, dry_run=True)
    assert ([task.status for task in report.done], new.path.exists()) == (["added"], False)


@pytest.mark.slow
def test_checkpoints_may_be_pickles(new: Fleet, tmp_path: Path) -> None:
    for step in (5, 10):
        pickle_weights(write_lora(tmp_path / "run" / f"checkpoint-{step}", seed=step))
    write_lora(tmp_path / "run" / "checkpoint-15", seed=15)
    (task,) = new.ingest([tmp_path / "run"], read_bin=True).done
    assert (task.new, task.converted_from) == (3, None)
    assert [adapter.step for adapter in new.show("run").task.adapters] == [5, 10, 15]


def test_a_hostile_pickle_costs_only_itself(new: Fleet, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    pickle_weights(write_lora(loras / "good", seed=1))
    write_lora(loras / "plain", seed=2)
    evil = pickle_weights(write_lora(loras / "evil"))
    torch.save({"a": RunsCommand(f"touch {tmp_path / 'ran'}")}, evil / "adapter_model.bin")
    report = new.ingest([loras], read_bin=True)
    assert [task.task for task in report.done] == ["good", "plain"]
    (problem,) = report.problems
    assert (problem.kind, problem.path, problem.task) == ("pickle", str(evil / "adapter_model.bin"), None)
    assert "\n" not in problem.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_strict_stores_nothing_where_a_pickle_is_hostile(new: Fleet, tmp_path: Path) -> None:
    write_lora(tmp_path / "loras" / "plain")
    evil = pickle_weights(write_lora(tmp_path / "loras" / "evil"))
    torch.save({"a": RunsCommand("true")}, evil / "adapter_model.bin")
    with pytest.raises(UnsafeInput):
        new.ingest([tmp_path / "loras"], read_bin=True, strict=True)
    assert not new.path.exists()


@pytest.mark.slow
def test_names_in_a_pickle_are_checked_as_in_safetensors(new: Fleet, tmp_path: Path) -> None:
    odd = pickle_weights(write_lora(tmp_path / "odd"))
    torch.save({"a\x1b[2J/../b": torch.ones(1)}, odd / "adapter_model.bin")
    with pytest.raises(UnsafeInput, match="invalid tensor name") as refused:
        new.ingest([odd], read_bin=True)
    assert refused.value.path == str(odd / "adapter_model.bin")


def test_what_peft_saves_without_safetensors_is_read(new: Fleet, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "made", safe_serialization=False)
    if not (tmp_path / "made" / "adapter_model.bin").exists():
        pytest.skip("this PEFT saves safetensors only")
    (task,) = new.ingest([tmp_path / "made"], read_bin=True).done
    assert task.converted_from == "adapter_model.bin"
