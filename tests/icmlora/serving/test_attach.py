"""One slot in a model, into which the adapters of a fleet are put one after the other."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from transformers import AutoModelForCausalLM

from icmlora import BaseModelMismatch, Bundle, DataError, Fleet, TaskNotFound, attach
from icmlora.serving.attach import SLOT
from tests.cli.tiny_fleet import icm_quietly, write_lora
from tests.icmlora.serving.conftest import Served
from tests.icmlora.tiny_base import LABEL, write_tiny_base
from tests.shared import use_config_of

TOKENS = torch.arange(1, 13)[None]
TASKS = ("poems", "rules", "silent", "poems")  # of different ranks, scalings and modules; an evicted one first


@pytest.fixture
def model(served_template: Served) -> Any:
    use_config_of(served_template.store.parent)
    return AutoModelForCausalLM.from_pretrained(served_template.base).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


def from_folder(served: Served, task: str, folder: Path) -> torch.Tensor:
    """What PEFT computes with the folder that `materialize` writes."""
    Fleet(served.store).materialize(task, folder)
    base = AutoModelForCausalLM.from_pretrained(served.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between PEFT and transformers
        adapted = PeftModel.from_pretrained(base, folder).eval()
    return logits(adapted)


def test_the_outputs_are_those_of_the_folder(served_template: Served, model: Any, tmp_path: Path) -> None:
    fleet = Fleet(served_template.store)
    for number, task in enumerate(TASKS):
        model = attach(model, fleet, task)
        expected = from_folder(served_template, task, tmp_path / str(number))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_nothing_of_the_adapter_before_remains(served_template: Served, model: Any) -> None:
    fleet = Fleet(served_template.store)
    first = logits(attach(model, fleet, "silent")).clone()
    model = attach(model, fleet, "rules")
    assert not torch.equal(logits(model), first)
    assert torch.equal(logits(attach(model, fleet, "silent")), first)


def test_a_bundle_will_do(served_template: Served, model: Any) -> None:
    from_bundle = logits(attach(model, Bundle(served_template.bundle), "poems")).clone()
    assert torch.equal(logits(attach(model, Fleet(served_template.store), "poems")), from_bundle)


def test_the_base_model_is_unchanged_underneath(served_template: Served, model: Any) -> None:
    before = logits(model).clone()
    attached = attach(model, Fleet(served_template.store), "rules")
    assert not torch.equal(logits(attached), before)
    with attached.disable_adapter():
        assert torch.equal(logits(attached), before)


def test_there_is_one_adapter_however_many_were_attached(served_template: Served, model: Any) -> None:
    fleet = Fleet(served_template.store)
    for task in TASKS * 5:
        model = attach(model, fleet, task)
    assert list(model.peft_config) == [SLOT]


@pytest.mark.slow
def test_the_memory_of_tensors_does_not_grow(served_template: Served, model: Any) -> None:
    def bytes_of_tensors() -> int:
        gc.collect()
        return sum(held.nbytes for held in tensors() if held.layout == torch.strided and held.device.type == "cpu")

    fleet = Fleet(served_template.store)
    for task in TASKS:
        model = attach(model, fleet, task)
    before = bytes_of_tensors()
    for task in TASKS * 5:
        model = attach(model, fleet, task)
    assert bytes_of_tensors() == before


def tensors() -> Iterator[torch.Tensor]:
    yield from (held for held in gc.get_objects() if issubclass(type(held), torch.Tensor))


def test_no_file_is_written(served_template: Served, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "mkdtemp", lambda *args, **kwargs: pytest.fail("a folder was made"))
    monkeypatch.setattr(tempfile, "mkstemp", lambda *args, **kwargs: pytest.fail("a file was made"))
    attach(model, Fleet(served_template.store), "poems")


def test_an_unknown_task_changes_nothing(served_template: Served, model: Any) -> None:
    fleet = Fleet(served_template.store)
    attached = attach(model, fleet, "rules")
    before = logits(attached).clone()
    with pytest.raises(TaskNotFound):
        attach(attached, fleet, "unknown")
    assert torch.equal(logits(attached), before)


def test_an_adapter_with_a_bias_is_refused(served: Served, model: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_lora(tmp_path / "biased", seed=4, bias="lora_only")
    weights = folder / "adapter_model.safetensors"
    biases = {"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(16)}
    save_file(load_file(weights) | biases, weights, metadata={"format": "pt"})
    icm_quietly(served.store, "ingest", folder, "--no-vectors")
    with pytest.raises(DataError, match="has tensors besides its LoRA factors"):
        attach(model, Fleet(served.store), "biased")


def test_a_model_without_the_modules_is_refused_and_unchanged(served_template: Served, model: Any) -> None:
    del model.model.layers[1]
    before = {name for name, _ in model.named_modules()}
    with pytest.raises(BaseModelMismatch, match=r"no linear layer 'model\.layers\.1"):
        attach(model, Fleet(served_template.store), "rules")
    assert {name for name, _ in model.named_modules()} == before


def test_a_model_of_the_same_shape_with_other_weights_is_warned_about(
    served_template: Served, model: Any, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(write_tiny_base(tmp_path / "other", seed=7)).eval()
    fleet = Fleet(served_template.store)
    with pytest.warns(UserWarning, match=f"weights differ from '{LABEL}'"):
        attached = attach(other, fleet, "rules")
    attach(attached, fleet, "poems")  # once is enough: warnings are errors here
    attach(model.bfloat16(), fleet, "rules")


def test_a_model_can_be_taken_out_of_the_slot_again(served_template: Served, model: Any) -> None:
    before = logits(model).clone()
    restored = attach(model, Fleet(served_template.store), "rules").unload()
    assert torch.equal(logits(restored), before)
    assert not any("lora" in name for name, _ in restored.named_modules())


def test_an_adapter_that_is_merged_into_the_model_is_not_overwritten(served_template: Served, model: Any) -> None:
    fleet = Fleet(served_template.store)
    attached = attach(model, fleet, "rules")
    before = logits(attached).clone()
    attached.merge_adapter()
    with pytest.raises(DataError, match="merged into the model"):
        attach(attached, fleet, "poems")
    attached.unmerge_adapter()
    torch.testing.assert_close(logits(attached), before)


def test_a_slot_that_was_prepared_for_compiling_keeps_its_tensors(served_template: Served, model: Any) -> None:
    fleet = Fleet(served_template.store)
    attached = attach(model, fleet, "rules")
    expected = logits(attach(attached, fleet, "poems")).clone()
    attached = attach(attached, fleet, "rules")
    prepare_model_for_compiled_hotswap(attached, target_rank=8)
    places = {name: value.data_ptr() for name, value in attached.named_parameters() if "lora_" in name}
    torch.testing.assert_close(logits(attach(attached, fleet, "poems")), expected)
    assert {name: value.data_ptr() for name, value in attached.named_parameters() if "lora_" in name} == places


def test_an_adapter_that_comes_back_is_not_decoded_again(
    served: Served, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(served.store)
    model = attach(model, fleet, "poems")
    first = logits(model).clone()
    model = attach(model, fleet, "rules")
    with monkeypatch.context() as patched:
        patched.setattr("icmlora.generator.codec.codec.Codec.decode", lambda *args: pytest.fail("it is decoded again"))
        torch.testing.assert_close(logits(attach(model, fleet, "poems")), first)


def test_a_task_that_changed_is_read_again(served: Served, model: Any) -> None:
    fleet = Fleet(served.store)
    model = attach(model, fleet, "rules")
    before = logits(model).clone()
    fleet.evict(["rules"], max_error=10)
    assert not torch.equal(logits(attach(model, fleet, "rules")), before)
