"""A base model with random weights and synthetic adapters for it, written in place: nothing is downloaded.

Quality means nothing here, time and memory do. The adapters have rank 16 on all linear layers, random directions, and
singular values that fall evenly, scaled so that an adapter changes what the model predicts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.icmlora.tiny_base import tiny_tokenizer

LABEL = "random/llama"
RANK = 16
SAMPLES, EVAL_TEXTS, NEW_SAMPLES = 32, 8, 64
_SPREAD = 0.02  # standard deviation of the base model's weights
_DECAY = 0.75  # of one singular value to the next; chosen, not measured


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama, and how many adapters are made for it."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tasks: int = 3

    def config(self) -> LlamaConfig:
        """Return the configuration that transformers loads."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=0,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
        )


SHAPES = {
    "8b": Shape(4096, 14336, 32, 32, 8, 128_256),
    "0.3b": Shape(1024, 4096, 16, 16, 8, 16_384),
    "tiny": Shape(64, 128, 2, 4, 2, 512),
}
"""Llama 3 8B; a sixteenth of its width and depth, 0.3 B parameters; and one for tests."""


def write_base(folder: Path, shape: Shape) -> int:
    """Write a base model one layer at a time, so that memory holds a single layer; return its parameters."""
    folder.mkdir(parents=True)
    shape.config().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    size = parameters = 0
    for number, names in enumerate(_by_file(shape)):
        tensors = {name: _weight(name, sizes, draw) for name, sizes in names.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def write_fleet(folder: Path, shape: Shape) -> list[str]:
    """Write the adapters with samples and held-out text, and samples of one more task; return the tasks' names."""
    names = [f"task-{number}" for number in range(shape.tasks)]
    for number, name in enumerate(names):
        _write_adapter(folder / name, shape, number)
        write_texts(folder / name / "samples.jsonl", number, SAMPLES)
        write_texts(folder / name / "eval.jsonl", 100 + number, EVAL_TEXTS)
    return names


def write_texts(file: Path, seed: int, count: int) -> None:
    """Write texts of random letters that are longer than what any command reads of a text."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (count, 300), generator=draw).tolist()
    file.write_text("".join(json.dumps({"text": bytes(row).decode()}) + "\n" for row in letters))


def _by_file(shape: Shape) -> Iterator[dict[str, torch.Size]]:
    """Yield names and sizes of the model's tensors: those outside the layers first, then layer by layer."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    yield {name: size for name, size in sizes.items() if ".layers." not in name}
    for layer in range(shape.layers):
        yield {name: size for name, size in sizes.items() if f".layers.{layer}." in name}


def _weight(name: str, sizes: torch.Size, draw: torch.Generator) -> torch.Tensor:
    if "norm" in name:
        return torch.ones(sizes, dtype=torch.bfloat16)
    return (_SPREAD * torch.randn(sizes, generator=draw)).to(torch.bfloat16)


def _write_adapter(folder: Path, shape: Shape, seed: int) -> None:
    keys = shape.hidden * shape.key_heads // shape.heads
    widths = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (shape.hidden, keys),
        "self_attn.v_proj": (shape.hidden, keys),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.hidden, shape.mlp),
        "mlp.up_proj": (shape.hidden, shape.mlp),
        "mlp.down_proj": (shape.mlp, shape.hidden),
    }
    draw = torch.Generator().manual_seed(seed)
    strength = (_DECAY ** torch.arange(RANK)).sqrt()
    tensors = {}
    for layer in range(shape.layers):
        for module, (inputs, outputs) in widths.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            # Rows of length about 1, then the spectrum: dW has singular values from 0.5 downwards.
            a = torch.randn(RANK, inputs, generator=draw) * inputs**-0.5
            b = torch.randn(outputs, RANK, generator=draw) * outputs**-0.5
            tensors[f"{name}.lora_A.weight"] = strength[:, None] * a
            tensors[f"{name}.lora_B.weight"] = 0.5 * strength * b
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": LABEL,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [module.rpartition(".")[2] for module in widths],
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
