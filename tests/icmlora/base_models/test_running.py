"""An adapter with extras runs as PEFT runs its folder, and afterwards the base model is what it was."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.attach import adapted
from icmlora.base_models.running.modules import Place, places_of
from icmlora.errors import AdapterRefused, BaseModelMismatch
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.peft.peft import PEFT

IDS = torch.arange(1, 20)[None]
QV = {"target_modules": ["q_proj", "v_proj"]}


def llama(*, tied: bool = False, biased: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=biased,
            mlp_bias=biased,
        )
    ).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def mixture() -> nn.Module:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    ).eval()


class Convolutions(nn.Module):
    """Embeds tokens and runs convolutions and attention over them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 8)
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.two = nn.Conv2d(1, 4, (3, 5), padding=(1, 2))
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.one(self.embed(input_ids).transpose(1, 2)))  # (texts, 8, T)
        hidden = self.attention(*[hidden.transpose(1, 2)] * 3)[0].transpose(1, 2)
        planes = self.two(hidden[:, None]).flatten(1, 2)  # (texts, 4 * 8, T)
        logits: torch.Tensor = self.head(planes.transpose(1, 2))
        return logits


def convolutions() -> nn.Module:
    return Convolutions().eval()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (llama, QV),
    "conv1d-of-gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "patterns": (llama, QV | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "rslora": (llama, QV | {"use_rslora": True, "lora_alpha": 3}),
    "some-layers": (llama, QV | {"layers_to_transform": [1]}),
    "an-expression": (llama, {"target_modules": r".*\.1\..*(q|up)_proj"}),
    "dora": (llama, QV | {"use_dora": True, "lora_alpha": 8}),
    "dora-with-patterns": (llama, QV | {"use_dora": True, "rank_pattern": {"v_proj": 2}}),
    "bias-lora-only": (lambda: llama(biased=True), QV | {"bias": "lora_only"}),
    "bias-all": (lambda: llama(biased=True), QV | {"bias": "all"}),
    "lora-bias": (lambda: llama(biased=True), QV | {"lora_bias": True, "lora_alpha": 12}),
    "whole-modules": (llama, QV | {"modules_to_save": ["lm_head", "norm", "input_layernorm"]}),
    "embedding-saved": (llama, QV | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied-embedding-saved": (lambda: llama(tied=True), QV | {"modules_to_save": ["embed_tokens"]}),
    "tied-embedding-saved-for-both": (
        lambda: llama(tied=True),
        QV | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "embedding-target": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head-target": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-targets": (
        lambda: llama(tied=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "token-rows": (llama, QV | {"trainable_token_indices": [5, 3]}),
    "token-rows-of-two-layers": (llama, QV | {"trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [7]}}),
    "tied-token-rows": (lambda: llama(tied=True), QV | {"trainable_token_indices": [5, 3]}),
    "everything": (
        lambda: llama(biased=True),
        QV | {"use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": [5], "bias": "all"},
    ),
    "convolutions": (convolutions, {"target_modules": ["embed", "one", "two", "head"]}),
    "convolutions-with-dora": (convolutions, {"target_modules": ["embed", "one", "two", "head"], "use_dora": True}),
    "buffers": (convolutions, {"target_modules": ["one"], "modules_to_save": ["norm"]}),
    "torch-attention": (convolutions, {"target_modules": ["attention"]}),
    "fused-experts": (mixture, {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
    "one-of-the-fused-parameters": (mixture, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "everything-of-a-mixture": (mixture, {"target_modules": "all-linear"}),
}


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write(network: nn.Module, folder: Path, **options: Any) -> Path:
    """Let PEFT make an adapter, change all of it, and save it."""
    with quiet():
        model = get_peft_model(network, LoraConfig(**{"r": 4, "lora_alpha": 6} | options))  # type: ignore[arg-type]
        random = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=random)
                # In place, as tied factors share memory.
                parameter.data += noise.abs() if "magnitude" in name else noise
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name and buffer.is_floating_point():
                buffer += 0.5
        model.save_pretrained(folder)
    return folder


def base_of(network: nn.Module) -> BaseModel:
    return BaseModel("tiny/base", network, None, "0" * 64, CausalLM(), 32, 2)


def read(folder: Path) -> RunnableAdapter:
    return PEFT.runnable(
        (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(input_ids=IDS)
    found: torch.Tensor = getattr(output, "logits", output)
    return found


@pytest.mark.one_case
@pytest.mark.parametrize("name", CASES)
def test_it_runs_as_peft_runs_its_folder_and_leaves_the_base_model_as_it_was(name: str, tmp_path: Path) -> None:
    make, options = CASES[name]
    folder = write(make(), tmp_path / "adapter", **options)
    with quiet():
        expected = logits(PeftModel.from_pretrained(make(), folder).eval())
    network = make()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    said = logits(network)
    with adapted(base_of(network), read(folder)):
        torch.testing.assert_close(logits(network), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, said, atol=1e-3)
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert torch.equal(logits(network), said)


class TestWhatCannotRun:
    @pytest.mark.parametrize(
        ("field", "value"),
        [("alora_invocation_tokens", [1, 2]), ("use_qalora", True), ("layer_replication", [[0, 2], [1, 2]])],
    )
    def test_it_says_how_the_adapter_works(self, tmp_path: Path, field: str, value: object) -> None:
        config = write(llama(), tmp_path / "adapter", **QV) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
        with pytest.raises(AdapterRefused, match="icm cannot run it"):
            read(tmp_path / "adapter")

    def test_magnitudes_of_some_modules_only_are_refused_by_name(self, tmp_path: Path) -> None:
        file = write(llama(), tmp_path / "adapter", **QV, use_dora=True) / "adapter_model.safetensors"
        tensors = load_file(file)
        del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"]
        save_file(tensors, file)
        with pytest.raises(AdapterRefused, match=r"layers\.1\.self_attn\.q_proj"):
            read(tmp_path / "adapter")

    def test_a_head_that_the_base_model_lacks_is_named_and_the_model_stays_as_it_was(self, tmp_path: Path) -> None:
        folder = write(llama(), tmp_path / "adapter", **QV, modules_to_save=["norm"])
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.score.weight"] = torch.ones(3, 32)
        save_file(tensors, folder / "adapter_model.safetensors")
        base = base_of(llama())
        said = logits(base.model)
        with pytest.raises(BaseModelMismatch, match=r"score\.weight"), adapted(base, read(folder)):
            pass
        assert torch.equal(logits(base.model), said)

    def test_a_head_of_another_width_is_refused(self, tmp_path: Path) -> None:
        folder = write(llama(), tmp_path / "adapter", **QV, modules_to_save=["norm"])
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.model.norm.weight"] = torch.ones(33)
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(BaseModelMismatch, match=r"shape \[33\]"), adapted(base_of(llama()), read(folder)):
            pass


def test_a_vocabulary_may_have_grown(tmp_path: Path) -> None:
    network = llama()
    network.resize_token_embeddings(70)
    folder = write(network, tmp_path / "adapter", **QV, modules_to_save=["embed_tokens", "lm_head"])
    base = base_of(llama())
    with adapted(base, read(folder)):
        assert logits(base.model).shape[-1] == 70
    assert logits(base.model).shape[-1] == 64


def test_a_name_that_ends_like_another_target_is_not_widened(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(64, 8)
            self.mix = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"mix": nn.Linear(8, 8)})

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.mix(self.inner["mix"](self.embed(input_ids)))
            return out

    folder = write(Mixed(), tmp_path / "adapter", target_modules="mix")
    with quiet():
        expected = logits(PeftModel.from_pretrained(Mixed(), folder))
    base = base_of(Mixed())
    with adapted(base, read(folder)):
        torch.testing.assert_close(logits(base.model), expected)


class TestNamesOfEarlierTransformers:
    def test_modules_of_a_model_that_was_rearranged_are_found(self) -> None:
        torch.manual_seed(0)
        text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        picture = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 32}
        both = Gemma3Config(text_config=text | heads, vision_config=picture | {"num_attention_heads": 4})
        base = base_of(Gemma3ForConditionalGeneration(both).eval())
        new, old = "model.language_model.layers.1.self_attn.q_proj", "language_model.model.layers.1.self_attn.q_proj"
        assert places_of(base, [old, new, "nothing.of.it"]) == {old: Place(new), new: Place(new)}
        said = []
        for name in (old, new):
            with adapted(base, one_module(name, 32, 32)):
                said.append(logits(base.model))
        assert torch.equal(*said)
        assert not torch.equal(said[0], logits(base.model))

    def test_single_experts_are_fused_as_peft_does(self) -> None:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2}
        network = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
        random = torch.Generator().manual_seed(0)
        modules = []
        for expert in range(2):
            for part, (inputs, outputs) in {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}.items():
                a, b = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
                modules.append(LoraModule(f"model.layers.0.block_sparse_moe.experts.{expert}.{part}", 0.3 * a, b))
        with adapted(base_of(network), RunnableAdapter(Adapter("tiny/moe", None, ("w1",), tuple(modules)))):
            said = logits(network)
        experts = network.model.layers[0].mlp.experts
        with torch.no_grad():
            for number, module in enumerate(modules):
                dw, expert = module.b @ module.a, number // 3
                whole = experts.down_proj if number % 3 == 1 else experts.gate_up_proj
                whole[expert][{0: slice(48), 1: slice(None), 2: slice(48, None)}[number % 3]] += dw
        torch.testing.assert_close(said, logits(network), rtol=1e-4, atol=1e-5)

    def test_a_module_that_is_nowhere_is_named(self) -> None:
        with (
            pytest.raises(BaseModelMismatch, match="none of the adapter"),
            adapted(base_of(llama()), one_module("no.q", 4, 4)),
        ):
            pass


def one_module(name: str, inputs: int, outputs: int) -> RunnableAdapter:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
    return RunnableAdapter(Adapter("tiny/base", None, (name,), (LoraModule(name, a, b),)))
