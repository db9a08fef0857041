"""A two-layer random Llama with a byte-level tokenizer, and adapters for it: real files, a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.modality import BaseModel

HIDDEN = 32
LABEL = "tiny/llama"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are single bytes, with no special token added to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def tiny_model(seed: int = 0, hidden: int = HIDDEN) -> LlamaForCausalLM:
    """Make the random network."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def write_tiny_base(folder: Path, seed: int = 0, hidden: int = HIDDEN) -> Path:
    """Write the model and the tokenizer as a Hugging Face folder."""
    tiny_model(seed, hidden).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_tiny_base(folder: Path, seed: int = 0, hidden: int = HIDDEN) -> BaseModel:
    """Write the model to `folder` and load it as a caller would."""
    return CausalLM().load(inspect_base(LABEL, write_tiny_base(folder, seed, hidden)))


def write_tiny_adapter(folder: Path, seed: int = 1, hidden: int = HIDDEN, strength: float = 0.5) -> Path:
    """Write a random rank-2 adapter on q_proj and v_proj as a PEFT folder."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for module, outputs in (("q_proj", hidden), ("v_proj", hidden // 2)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = strength * torch.randn(2, hidden, generator=random)
            tensors[f"{name}.lora_B.weight"] = strength * torch.randn(outputs, 2, generator=random)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": LABEL,
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
