"""LoRAs on layers that are no matrices: convolutions, embeddings, fused experts, torch's own attention."""

from __future__ import annotations

from typing import Any

from tests.compat.building import lora
from tests.compat.case import Case, Outcome

_CONVOLUTIONS = "Convolutions and attention"
_EXPERTS = "Fused experts"
_MIXTURE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _layer(name: str, base: str, targets: Any, outcome: Outcome = "exact", remark: str = "", **options: Any) -> Case:
    return lora(name, base, {"target_modules": targets} | options, outcome, _CONVOLUTIONS, remark)


def _experts(name: str, base: str, parameters: list[str], remark: str = "", **options: Any) -> Case:
    chosen = {"target_modules": [], "target_parameters": parameters, "task_type": "CAUSAL_LM", "r": 2} | options
    return lora(name, base, chosen, "exact", _EXPERTS, remark)


def _all(base: str) -> Case:
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 2}
    return lora(f"{base}-all-linear", base, options, "exact", _EXPERTS, "PEFT adds `target_parameters` by itself")


_UNET = ["to_q", "to_k", "to_v", "to_out.0"]

CASES: tuple[Case, ...] = (
    _layer("resnet", "resnet", ["convolution"]),
    _layer("resnet-dora", "resnet", ["convolution"], "extras", "magnitudes", use_dora=True),
    _layer("unet-attention", "small-unet", _UNET),
    _layer("unet-convolutions", "small-unet", [*_UNET, "conv_in", "shortcut"]),
    _layer("convolution-1d", "small-unet", ["to_q", "line"]),
    _layer("convolution-3d", "small-unet", ["to_q", "volume"]),
    _layer("grouped-convolution", "small-unet", ["grouped"], remark="a module for each group"),
    _layer("wav2vec2-convolutions", "wav2vec2", r".*conv_layers\.\d+\.conv"),
    _layer("torch-attention", "attention", ["attention"], remark="one matrix for three projections"),
    _layer("florence2-everything", "florence2", ["q_proj", "v_proj", "lm_head", "fc2", "convs.0.conv"], "extras"),
    _layer("dinov2-patches", "dinov2", ["q_proj", "projection"]),
    _experts("mixtral-experts", "mixtral", _MIXTURE),
    _experts("mixtral-experts-and-attention", "mixtral", _MIXTURE, target_modules=["q_proj", "v_proj"]),
    _experts("mixtral-one-parameter", "mixtral", ["mlp.experts.down_proj"]),
    _experts("qwen3-moe-experts", "qwen3-moe", _MIXTURE),
    _experts("qwen3-moe-router", "qwen3-moe", ["mlp.gate.weight"], "one matrix"),
    _experts("gpt-oss-experts", "gpt-oss", _MIXTURE, "stored the other way round"),
    _experts("gpt-oss-some-layers", "gpt-oss", ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]),
    _experts("llama4-experts", "llama4", ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]),
    _experts("experts-rank-pattern", "mixtral", _MIXTURE, "a rank for each", rank_pattern={".*gate_up_proj": 3}),
    _experts("experts-rslora", "mixtral", _MIXTURE, use_rslora=True),
    _all("mixtral"),
    _all("qwen3-moe"),
    _all("deepseek-v3"),
)
