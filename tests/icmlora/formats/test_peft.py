"""Adapters read from and written to PEFT folders, and what PEFT itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save

from icmlora.adapter.canonical import canonicalize
from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused, OutputExists
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from icmlora.formats.format import AdapterBytes, write_adapter_files
from icmlora.formats.peft.peft import PEFT
from tests.icmlora.adapter_files import INPUTS, OUTPUTS, Q0, V0, adapter, config, factors, key, weights, write_adapter
from tests.icmlora.tiny_base import tiny_model

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def read(config: bytes, weights: bytes, path: str | None = None) -> Adapter:
    return PEFT.read(config, weights, path=path).adapter


IDS = torch.arange(1, 20)[None]


def tuned(folder: Path, **fields: Any) -> torch.Tensor:
    """Write a random adapter with PEFT and return the logits of the model that has it."""
    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(), LoraConfig(**{**plain, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
        model.peft_config["default"].base_model_name_or_path = "tiny/llama"
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return torch.as_tensor(model.eval()(IDS).logits)


def logits_of(folder: Path) -> torch.Tensor:
    """Load a folder with PEFT and return the logits; a warning, such as one of missing keys, fails the test."""
    with torch.no_grad():
        model = PeftModel.from_pretrained(tiny_model(), folder).eval()
        return torch.as_tensor(model(IDS).logits)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 11}},
    {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9}},
    {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    {"r": 1},
    {"r": 16},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_peft_gives_the_same_logits_for_the_canonical_form(tmp_path: Path, fields: dict[str, Any]) -> None:
    before = tuned(tmp_path / "in", **fields)
    canonical = canonicalize(load_adapter(tmp_path / "in"))
    save_adapter(canonical, tmp_path / "out", dtype="float32")
    torch.testing.assert_close(logits_of(tmp_path / "out"), before, rtol=1e-4, atol=1e-5)


def test_peft_finds_every_key_it_expects(tmp_path: Path) -> None:
    tuned(tmp_path / "in")
    save_adapter(load_adapter(tmp_path / "in"), tmp_path / "out")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    result = model.load_adapter(tmp_path / "out", "again")
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]


def test_the_scale_is_folded_into_b() -> None:
    loaded = read(config(lora_alpha=6), weights())
    assert torch.equal(loaded.modules[0].a, factors()[key(Q0, "A")])
    assert torch.equal(loaded.modules[0].b, factors()[key(Q0, "B")] * 3.0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_type_widens_exactly(dtype: str) -> None:
    loaded = read(config(), weights(dtype=dtype))
    assert torch.equal(loaded.modules[0].a, factors()[key(Q0, "A")].to(getattr(torch, dtype)).float())


def test_types_may_be_mixed_and_misaligned() -> None:
    tensors = factors()
    tensors[key(V0, "A")] = tensors[key(V0, "A")].bfloat16()
    loaded = read(config(), save(tensors))
    for module in loaded.modules:
        assert torch.equal(module.a, tensors[key(module.name, "A")].float())


def test_a_scaled_value_beyond_float32_is_refused() -> None:
    tensors = factors()
    tensors[key(V0, "B")][0, 0] = 3e38
    with pytest.raises(AdapterRefused, match="exceeds float32") as caught:
        read(config(lora_alpha=200), weights(tensors), path="x")
    assert (caught.value.kind, caught.value.path) == ("overflow", "x")


def test_a_folder_without_weights_is_refused_with_its_path(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterRefused) as caught:
        load_adapter(tmp_path / "a")
    assert (caught.value.kind, caught.value.path) == ("no-weights", str(tmp_path / "a"))


def written(tmp_path: Path, name: str = "out", **arguments: Any) -> Path:
    source = read(config(lora_alpha=6, revision="abc"), weights())
    save_adapter(source, tmp_path / name, **{"card": "# Card\n", "metadata": {"icm": "1"}, **arguments})
    return tmp_path / name


def test_the_written_configuration_is_plain(tmp_path: Path) -> None:
    fields = json.loads((written(tmp_path) / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["use_rslora"]) == (2, 2, {}, False)
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("tiny/llama", "abc")
    assert fields["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 33])
def test_a_fresh_adapter_has_its_own_rank(tmp_path: Path, rank: int) -> None:
    source = read(config(r=rank), weights(factors(rank=rank)))
    save_adapter(source, tmp_path / "out")
    loaded = load_adapter(tmp_path / "out")
    assert {module.a.shape[0] for module in loaded.modules} == {rank}
    assert squared_error(source, loaded) < 1e-4


def test_a_fresh_adapter_of_several_ranks_has_the_largest_everywhere(tmp_path: Path) -> None:
    tensors = factors((Q0,), rank=3) | factors((V0,), rank=2, seed=1)
    source = read(config(rank_pattern={"q_proj": 3}), weights(tensors))
    save_adapter(source, tmp_path / "out", dtype="float32")
    loaded = load_adapter(tmp_path / "out")
    assert {module.a.shape[0] for module in loaded.modules} == {3}
    assert squared_error(source, loaded) < 1e-12


def test_card_and_metadata_are_written(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert (folder / "README.md").read_text() == "# Card\n"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "icm": "1"}


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = written(tmp_path, "one"), written(tmp_path, "two")
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-16), ("float16", 2**-20), ("float32", 2**-44)])
def test_rounding_stays_within_the_type(tmp_path: Path, dtype: str, error: float) -> None:
    source = read(config(), weights())
    loaded = load_adapter(written_as(source, tmp_path, dtype))
    assert squared_error(source, loaded) < error


def written_as(source: Any, tmp_path: Path, dtype: str) -> Path:
    save_adapter(source, tmp_path / dtype, dtype=dtype)
    return tmp_path / dtype


def test_a_value_that_float16_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    big = adapter((Q0, torch.full((2, INPUTS), 1e5), torch.ones(OUTPUTS, 2)))
    with pytest.raises(AdapterRefused, match="F16 cannot represent") as caught:
        save_adapter(big, tmp_path / "out", dtype="float16")
    assert caught.value.kind == "overflow"
    assert list(tmp_path.glob("out*")) == []


def test_writing_into_a_filled_folder_needs_force(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(OutputExists):
        written(tmp_path)
    assert written(tmp_path, force=True, card="new").joinpath("README.md").read_text() == "new"


def test_an_original_is_written_byte_for_byte(tmp_path: Path) -> None:
    write_adapter_files(tmp_path / "out", PEFT, AdapterBytes(weights(), config(my_note="kept"), b"card"), "out")
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == config(my_note="kept")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights()
