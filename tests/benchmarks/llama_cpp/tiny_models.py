"""Random models of every architecture for which icm writes GGUF adapters, and a random adapter for each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_GEMMA = {"head_dim": 32, "sliding_window": 256, "query_pre_attn_scalar": 32}
_GEMMA3 = {**_GEMMA, "num_hidden_layers": 6}  # the sixth sees the whole text
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "CohereForCausalLM": ("CohereConfig", {}),
    "GemmaForCausalLM": ("GemmaConfig", {"head_dim": 32}),
    "Gemma2ForCausalLM": ("Gemma2Config", _GEMMA),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _GEMMA3),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": {**_COMMON, **_GEMMA3}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
    "GraniteForCausalLM": (
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "Lfm2ForCausalLM": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {"head_dim": 32}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "OlmoForCausalLM": ("OlmoConfig", {}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 32}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {"num_hidden_layers": 4}),  # the fourth has no rotary embeddings
    "StableLmForCausalLM": ("StableLmConfig", {}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", {"use_bias": True}),
}


def write_model(name: str, folder: Path) -> PreTrainedModel:
    """Make a random model whose outputs vary, and write it with a byte-level tokenizer."""
    torch.manual_seed(0)
    kind, fields = MODELS[name]
    config = getattr(transformers, kind)(**{**_COMMON, **fields})
    model: PreTrainedModel = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.ndim == 2:  # what blocks add counts more than the token itself, which would else be repeated
                parameter.normal_(std=(1 if "embed" in part else 1.5) * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    words = ["a", "b", "ab", *(f"w{number:03}" for number in range(3, _COMMON["vocab_size"]))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))  # llama.cpp reads none without a merge
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model


def adapted(model: PreTrainedModel, folder: Path, *, use_dora: bool = False) -> PeftModel:
    """Give a model a random adapter of all its linear layers, with mixed ranks and rsLoRA, and write it with PEFT."""
    # PEFT's adapters of fused experts have no place in a GGUF adapter.
    is_mixture = any("experts" in name for name, _ in model.named_modules())
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if is_mixture else "all-linear",
        exclude_modules=".*(vision_tower|multi_modal_projector).*",
        use_rslora=True,
        use_dora=use_dora,
        rank_pattern={"o_proj": 2, "layers.1.self_attn.k_proj": 6},
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config).eval()
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        peft.save_pretrained(folder)
    return peft
