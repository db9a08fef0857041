"""`Fleet.materialize` and `Bundle.materialize` for llama.cpp and MLX-LM: every source, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmlora import (
    AdapterRefused,
    BaseModelNotFound,
    Bundle,
    DataError,
    Fleet,
    OutputExists,
    load_adapter,
)
from icmlora.errors import BaseModelUnsuited
from icmlora.fleet.write.sources import Source
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.base_models.test_gguf import write_tiny_gguf
from tests.icmlora.fleet.kept_tasks import head, write_loha
from tests.icmlora.fleet.stores import files_of
from tests.icmlora.formats.test_gguf_lora import facts, in_order, read, updates
from tests.icmlora.tiny_base import LABEL

Converted = Literal["gguf", "mlx"]
BOTH: tuple[Converted, ...] = ("gguf", "mlx")
SOURCES: tuple[Source, ...] = ("original", "code", "recalled", "network")
HEADS = {"attn_q": 4, "attn_k": 2}  # of the tiny model


def output(tmp_path: Path, adapter_format: Converted, name: str = "out") -> Path:
    return tmp_path / (f"{name}.gguf" if adapter_format == "gguf" else name)


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    """Return dW of each module of a PEFT folder."""
    return {module.name: module.b @ module.a for module in load_adapter(folder).modules}


def written(path: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Return the same of what was written for llama.cpp or MLX-LM, read as these programs do."""
    if path.is_dir():
        scale = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]["scale"]
        tensors = load_file(path / "adapters.safetensors")
        names = {name.rpartition(".")[0] for name in tensors}
        return {name: scale * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T for name in names}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    found = {}
    for target, update in updates(read(path.read_bytes(), tmp_path)).items():
        _, layer, kind, _ = target.split(".")
        found[f"model.layers.{layer}.{names[kind]}"] = in_order(update, HEADS[kind]) if kind in HEADS else update
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.one_case
@pytest.mark.parametrize("adapter_format", BOTH)
@pytest.mark.parametrize("source", SOURCES)
def test_a_converted_adapter_does_what_the_peft_folder_does(
    fleet: Fleet, tmp_path: Path, source: Source, adapter_format: Converted
) -> None:
    path = output(tmp_path, adapter_format)
    fleet.materialize("rules", tmp_path / "peft", source=source)
    report = fleet.materialize("rules", path, source=source, adapter_format=adapter_format)
    assert (report.source, report.adapter_format, report.directory) == (source, adapter_format, path)
    assert_equal(written(path, tmp_path), wanted(tmp_path / "peft"))


@pytest.mark.parametrize("adapter_format", BOTH)
def test_a_task_of_a_bundle_has_the_bytes_that_it_has_in_the_store(
    fleet: Fleet, base_folder: Path, tmp_path: Path, adapter_format: Converted
) -> None:
    bundle = Bundle(fleet.export_bundle(tmp_path / "fleet.icm").file)
    one, two = output(tmp_path, adapter_format, "one"), output(tmp_path, adapter_format, "two")
    fleet.materialize("poems", one, source="code", adapter_format=adapter_format)
    base = base_folder if adapter_format == "gguf" else None
    bundle.materialize("poems", two, adapter_format=adapter_format, base_model=base)
    assert files_of(one) == files_of(two) if one.is_dir() else one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("adapter_format", BOTH)
def test_an_evicted_task_is_converted_from_its_code(fleet: Fleet, tmp_path: Path, adapter_format: Converted) -> None:
    fleet.evict(["poems"], max_error=0.7)
    assert fleet.materialize("poems", output(tmp_path, adapter_format), adapter_format=adapter_format).source == "code"


@pytest.mark.parametrize("adapter_format", BOTH)
def test_the_digest_is_that_of_the_weights(fleet: Fleet, tmp_path: Path, adapter_format: Converted) -> None:
    path = output(tmp_path, adapter_format)
    report = fleet.materialize("poems", path, adapter_format=adapter_format)
    file = path / "adapters.safetensors" if path.is_dir() else path
    assert report.weights == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("adapter_format", BOTH)
def test_the_same_call_writes_the_same_bytes(fleet: Fleet, tmp_path: Path, adapter_format: Converted) -> None:
    reports = [
        fleet.materialize("rules", output(tmp_path, adapter_format, name), source="code", adapter_format=adapter_format)
        for name in ("one", "two")
    ]
    assert reports[0].weights == reports[1].weights


def test_the_header_of_a_gguf_file_says_where_it_comes_from(fleet: Fleet, tmp_path: Path) -> None:
    report = fleet.materialize("poems", tmp_path / "a.gguf", source="code", adapter_format="gguf")
    found = facts(read((tmp_path / "a.gguf").read_bytes(), tmp_path))
    assert (found["icm.task"], found["icm.rung"], found["icm.generator"]) == ("poems", "code", report.generator)
    assert (found["general.architecture"], found["general.base_model.0.name"]) == ("llama", LABEL)
    assert found["adapter.lora.task_name"] == "poems"


def test_the_header_of_an_mlx_adapter_says_where_it_comes_from(fleet: Fleet, tmp_path: Path) -> None:
    fleet.materialize("poems", tmp_path / "out", adapter_format="mlx")
    with safe_open(tmp_path / "out" / "adapters.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx", "icm_task": "poems", "icm_rung": "original"}


def test_a_converted_original_lost_nothing_unless_it_was_rounded(fleet: Fleet, tmp_path: Path) -> None:
    exact = fleet.materialize("poems", tmp_path / "exact", adapter_format="mlx")
    rounded = fleet.materialize("poems", tmp_path / "rounded", adapter_format="mlx", dtype="float16")
    assert (exact.squared_error, exact.retained_gain) == (0.0, 1.0)
    assert (rounded.squared_error, rounded.retained_gain) == (None, None)


def test_one_rank_can_be_asked_for(fleet: Fleet, tmp_path: Path) -> None:
    fleet.materialize("poems", tmp_path / "a.gguf", source="code", adapter_format="gguf", pad_rank=16)
    reader = read((tmp_path / "a.gguf").read_bytes(), tmp_path)
    assert {tensor.shape.tolist()[1] for tensor in reader.tensors if tensor.name.endswith("lora_a")} == {16}
    fleet.materialize("poems", tmp_path / "peft", source="code", pad_rank=16)
    assert_equal(written(tmp_path / "a.gguf", tmp_path), wanted(tmp_path / "peft"))


# the base model


def test_a_base_model_in_a_gguf_file_is_enough(fleet: Fleet, tmp_path: Path) -> None:
    fleet.materialize("rules", tmp_path / "one.gguf", adapter_format="gguf")
    fleet.add_base_model(LABEL, write_tiny_gguf(tmp_path / "base.gguf"))
    fleet.materialize("rules", tmp_path / "two.gguf", adapter_format="gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_without_the_base_model_the_error_says_why_it_is_needed_and_how_to_add_it(fleet: Fleet, tmp_path: Path) -> None:
    fleet.forget_base_model(LABEL)
    with pytest.raises(BaseModelNotFound, match="a GGUF adapter needs the configuration of its base model") as error:
        fleet.materialize("rules", tmp_path / "a.gguf", adapter_format="gguf")
    assert "icm base add" in (error.value.hint or "")
    assert not (tmp_path / "a.gguf").exists()


def test_a_bundle_without_the_base_model_says_how_to_name_it(fleet: Fleet, tmp_path: Path) -> None:
    bundle = Bundle(fleet.export_bundle(tmp_path / "fleet.icm").file)
    with pytest.raises(BaseModelNotFound) as error:
        bundle.materialize("poems", tmp_path / "a.gguf", adapter_format="gguf")
    assert "--base-model PATH" in (error.value.hint or "")


def test_mlx_needs_no_base_model(fleet: Fleet, tmp_path: Path) -> None:
    fleet.forget_base_model(LABEL)
    fleet.materialize("rules", tmp_path / "out", adapter_format="mlx")
    assert sorted(files_of(tmp_path / "out")) == ["adapter_config.json", "adapters.safetensors"]


def test_a_base_model_that_llama_cpp_has_otherwise_is_refused(fleet: Fleet, base_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in base_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"architectures": ["GPTNeoXForCausalLM"]}))
    fleet.add_base_model(LABEL, other)
    with pytest.raises(BaseModelUnsuited, match="'GPTNeoXForCausalLM'") as error:
        fleet.materialize("rules", tmp_path / "a.gguf", adapter_format="gguf")
    assert error.value.path == str(other)


# what is refused


@pytest.fixture
def odd(fleet: Fleet, tmp_path: Path) -> Fleet:
    """The fleet with tasks that have a head, another method, a condition, and one that came with a tokenizer."""
    headed = write_lora(tmp_path / "more" / "headed", seed=12)
    tensors = load_file(headed / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.score.weight": head()}, headed / "adapter_model.safetensors")
    write_loha(tmp_path / "more" / "loha")
    write_lora(tmp_path / "more" / "called", seed=13, alora_invocation_tokens=[5, 6])
    write_lora(tmp_path / "more" / "spoken", seed=11)
    (tmp_path / "more" / "spoken" / "tokenizer.json").write_text("{}")
    fleet.ingest([tmp_path / "more"])
    return fleet


@pytest.mark.parametrize("adapter_format", BOTH)
@pytest.mark.parametrize(
    ("task", "fact"),
    [
        ("headed", "this one also has the whole tensor score.weight"),
        ("loha", "peft_type is 'LOHA'"),
        ("called", "it acts only after its invocation tokens"),
    ],
)
def test_what_has_no_place_is_refused_by_name_and_nothing_is_written(
    odd: Fleet, tmp_path: Path, task: str, fact: str, adapter_format: Converted
) -> None:
    path = output(tmp_path, adapter_format)
    with pytest.raises(AdapterRefused, match=fact):
        odd.materialize(task, path, adapter_format=adapter_format)
    assert not path.exists()


@pytest.mark.parametrize("adapter_format", BOTH)
def test_files_that_came_with_an_adapter_are_named_as_left_out(
    odd: Fleet, tmp_path: Path, adapter_format: Converted
) -> None:
    report = odd.materialize("spoken", output(tmp_path, adapter_format), adapter_format=adapter_format)
    assert report.left_out == ("tokenizer.json",)
    assert odd.materialize("spoken", tmp_path / "peft").left_out == ()


@pytest.mark.parametrize("name", ["adapter", "adapter.safetensors", "adapter.GGUF"])
def test_a_gguf_adapter_is_a_file_of_that_name(fleet: Fleet, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="a gguf adapter is one file") as error:
        fleet.materialize("poems", tmp_path / name, adapter_format="gguf")
    assert "NAME.gguf" in (error.value.hint or "")
    assert not (tmp_path / name).exists()


def test_a_folder_of_that_name_is_none(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").mkdir()
    with pytest.raises(DataError, match="a gguf adapter is one file"):
        fleet.materialize("poems", tmp_path / "a.gguf", adapter_format="gguf", force=True)


@pytest.mark.parametrize("adapter_format", BOTH)
def test_what_is_there_stays_without_force(fleet: Fleet, tmp_path: Path, adapter_format: Converted) -> None:
    path = output(tmp_path, adapter_format)
    fleet.materialize("poems", path, adapter_format=adapter_format)
    before = files_of(tmp_path)
    with pytest.raises(OutputExists):
        fleet.materialize("rules", path, adapter_format=adapter_format)
    assert files_of(tmp_path) == before
    fleet.materialize("rules", path, adapter_format=adapter_format, force=True)
    fleet.materialize("rules", output(tmp_path, adapter_format, "again"), adapter_format=adapter_format)
    assert_equal(written(path, tmp_path), written(output(tmp_path, adapter_format, "again"), tmp_path))


def test_an_unknown_format_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'onnx'"):
        fleet.materialize("poems", tmp_path / "out", adapter_format="onnx")
    assert not (tmp_path / "out").exists()


def test_an_unknown_number_format_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown number format 'int8'"):
        fleet.materialize("poems", tmp_path / "a.gguf", adapter_format="gguf", dtype="int8")  # type: ignore[arg-type]
    assert not (tmp_path / "a.gguf").exists()
