"""LoRAs with something beside them: whole layers, biases, magnitudes, token rows, copies of the base, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.compat.building import from_plain, lora, store_as
from tests.compat.case import Case, Outcome

_HEADS = "Heads and whole layers"
_VECTORS = "Biases, magnitudes, token rows"
_FILES = "Files beside an adapter"
_ATTENTION = ["q_proj", "v_proj"]
_QV = {"target_modules": _ATTENTION, "task_type": "CAUSAL_LM"}


def _with(
    name: str, group: str, remark: str = "", base: str = "llama", outcome: Outcome = "extras", **options: Any
) -> Case:
    return lora(name, base, _QV | options, outcome, group, remark)


def _head(name: str, base: str, targets: list[str], task: str | None, remark: str = "", **options: Any) -> Case:
    return lora(name, base, {"target_modules": targets, "task_type": task} | options, "extras", _HEADS, remark)


def _target(name: str, module: str, kept: bool) -> Case:
    options = _QV | {"target_modules": [*_ATTENTION, module]}
    remark = "with a copy of the base's layer" if kept else ""
    saving = {"save_embedding_layers": kept}
    return lora(name, "llama", options, "extras" if kept else "exact", _HEADS, remark, saving=saving)


def _tokenizer(folder: Path) -> None:
    """Write what a trainer saves of a tokenizer."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 264}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")


def _value_head(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    save_file(
        {"v_head.summary.weight": weight, "v_head.summary.bias": torch.ones(1)}, folder / "value_head.safetensors"
    )


_ROWS = {"embed_tokens": [5, 6], "lm_head": [7]}
_BOTH_ENDS = ["embed_tokens", "lm_head"]
_OBJECTS = ["class_labels_classifier", "bbox_predictor"]

CASES: tuple[Case, ...] = (
    _head("bert-sequence-classifier", "bert-classifier", ["query", "value"], "SEQ_CLS", "PEFT adds the head"),
    _head("roberta-token-classifier", "roberta-tagger", ["query", "value"], "TOKEN_CLS", "PEFT adds the head"),
    _head("llama-sequence-classifier", "llama-classifier", _ATTENTION, "SEQ_CLS", "PEFT adds the head"),
    _head("vit-classifier", "vit", _ATTENTION, None, "as in PEFT's documentation", modules_to_save=["classifier"]),
    _head("segformer-decoder", "segformer", _ATTENTION, None, "with integer buffers", modules_to_save=["decode_head"]),
    _head("detr-heads", "detr", _ATTENTION, None, modules_to_save=_OBJECTS),
    _with("embeddings-and-lm-head-saved", _HEADS, modules_to_save=_BOTH_ENDS),
    _with("norms-saved", _HEADS, modules_to_save=["input_layernorm", "norm"]),
    _with(
        "tied-embeddings-saved", _HEADS, base="llama-tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    _target("lm-head-target", "lm_head", kept=True),
    _target("lm-head-target-alone", "lm_head", kept=False),
    _target("embedding-target", "embed_tokens", kept=True),
    _target("embedding-target-alone", "embed_tokens", kept=False),
    _with(
        "tied-embedding-targets",
        _HEADS,
        "both ends share one LoRA",
        base="llama-tied",
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=True,
    ),
    lora(
        "mamba-embeddings",
        "mamba",
        {"target_modules": ["x_proj", "embeddings", "in_proj"], "task_type": "CAUSAL_LM"},
        "exact",
        _HEADS,
        "as in Mamba's documentation",
    ),
    _with("dora", _VECTORS, "magnitudes", use_dora=True),
    _with("dora-rslora", _VECTORS, "magnitudes", use_dora=True, use_rslora=True, rank_pattern={"v_proj": 2}),
    lora("dora-bfloat16", "llama", _QV | {"use_dora": True}, "extras", _VECTORS, "magnitudes", dtype="bfloat16"),
    lora(
        "dora-float32-magnitudes",
        "llama",
        _QV | {"use_dora": True},
        "extras",
        _VECTORS,
        "number formats by turns",
        after=lambda folder: store_as(folder, "float16", "float16", "float32"),
        loads=False,
    ),
    _with("bias-all", _VECTORS, base="llama-biased", bias="all"),
    _with("bias-lora-only", _VECTORS, base="llama-biased", bias="lora_only"),
    _with("bias-all-without-biases", _VECTORS, "the base model has none", outcome="exact", bias="all"),
    _with("lora-bias", _VECTORS, base="llama-biased", lora_bias=True),
    _with("token-rows", _VECTORS, trainable_token_indices=[5, 6]),
    _with("token-rows-tied", _VECTORS, base="llama-tied", trainable_token_indices=[5, 6]),
    _with("token-rows-of-two-layers", _VECTORS, trainable_token_indices=_ROWS),
    _with("everything-at-once", _VECTORS, use_dora=True, modules_to_save=["norm"], trainable_token_indices=[5]),
    from_plain("tokenizer-files", _tokenizer, "extras", _FILES, "tokenizer and chat template come back", loads=True),
    from_plain("value-head", _value_head, "extras", _FILES, "of reinforcement learning with trl", loads=True),
)
