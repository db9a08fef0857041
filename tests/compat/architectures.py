"""Plain LoRAs on the architectures that people train: what is coded is exact, whatever the base model is made for."""

from __future__ import annotations

from typing import Any

from tests.compat.bases_text import CAUSAL
from tests.compat.building import lora
from tests.compat.case import Case

_ATTENTION = ("q_proj", "v_proj")

# What people target in models whose projections have other names.
_TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj"),
    "gpt2": ("c_attn",),
    "gpt-neox": ("query_key_value",),
    "falcon": ("query_key_value",),
    "bloom": ("query_key_value",),
    "mamba": ("x_proj", "in_proj"),
    "mamba2": ("in_proj",),
    "lfm2": ("q_proj", "v_proj", "in_proj", "out_proj"),
    "qwen3-next": ("q_proj", "v_proj", "in_proj_qkvz", "out_proj"),
    "deepseek-v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
}
# They stand for options, not for architectures.
_VARIANTS = {"llama-tied", "llama-biased", "llama-deep", "llama-wide"}
# Not those with fused experts, which PEFT's "all-linear" reaches: they are in `layers`.
_ALL_LINEAR = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "falcon", "opt", "gpt-j")


def _causal(name: str, suffix: str = "", **options: Any) -> Case:
    options = {"target_modules": list(_TARGETS.get(name, _ATTENTION)), "task_type": "CAUSAL_LM"} | options
    if name == "gpt2":
        options["fan_in_fan_out"] = True
    remark = "one module name with two widths" if name == "gemma4" else ""
    dtype = "bfloat16" if not suffix and len(name) % 2 else "float32"
    return lora(name + suffix, name, options, "exact", "Causal language models", remark, dtype=dtype)


def _row(name: str, base: str, targets: Any, group: str, *, remark: str = "", **options: Any) -> Case:
    return lora(name, base, {"target_modules": targets} | options, "exact", group, remark)


_MLP = ("fc1", "fc2")
_TEXT_TO_TEXT = "Encoders with decoders"
_ENCODERS = "Text encoders"
_VISION = "Vision and speech"
_BOTH = "Vision with language"

CASES: tuple[Case, ...] = (
    *(_causal(name) for name in CAUSAL if name not in _VARIANTS),
    *(_causal(name, "-all-linear", target_modules="all-linear", r=2) for name in _ALL_LINEAR),
    _row("t5", "t5", ["q", "v"], _TEXT_TO_TEXT, task_type="SEQ_2_SEQ_LM"),
    _row("t5-all-linear", "t5", "all-linear", _TEXT_TO_TEXT, task_type="SEQ_2_SEQ_LM"),
    _row("bart", "bart", ["q_proj", "v_proj"], _TEXT_TO_TEXT, task_type="SEQ_2_SEQ_LM"),
    _row("nllb", "nllb", ["q_proj", "v_proj", "out_proj", *_MLP], _TEXT_TO_TEXT, task_type="SEQ_2_SEQ_LM"),
    _row("bert-features", "bert", ["query", "value"], _ENCODERS, task_type="FEATURE_EXTRACTION"),
    _row("bert-masked", "bert-masked", ["query", "value"], _ENCODERS, remark="not scored as a causal model"),
    _row("bert-without-task-type", "bert-classifier", ["query", "value"], _ENCODERS, remark="`auto_mapping` is kept"),
    _row("esm", "esm", ["query", "key", "value"], _ENCODERS, task_type="FEATURE_EXTRACTION"),
    _row("vit", "vit", ["q_proj", "v_proj"], _VISION),
    _row("dinov2", "dinov2", "all-linear", _VISION),
    _row("swin", "swin", ["q_proj", "v_proj", *_MLP], _VISION),
    _row("clip", "clip", ["q_proj", "v_proj"], _VISION),
    _row("clip-one-tower", "clip", r"vision_model.*\.(q_proj|v_proj)", _VISION, remark="the other tower stays without"),
    _row("owl-vit", "owl-vit", r".*vision_model.*(q_proj|v_proj)", _VISION),
    _row("yolos", "yolos", ["query", "value"], _VISION),
    _row("detr", "detr", ["q_proj", "v_proj", *_MLP], _VISION),
    _row("rt-detr", "rt-detr", ["q_proj", "v_proj", "value_proj"], _VISION),
    _row("whisper", "whisper", ["q_proj", "v_proj"], _VISION),
    _row("wav2vec2", "wav2vec2", ["q_proj", "k_proj", "v_proj", "out_proj"], _VISION),
    _row("smolvlm", "smolvlm", ["q_proj", "v_proj"], _BOTH),
    _row(
        "smolvlm-text-tower",
        "smolvlm",
        r".*text_model.*(q_proj|v_proj)",
        _BOTH,
        remark="the other tower stays without",
        task_type="CAUSAL_LM",
    ),
    _row("idefics3", "idefics3", "all-linear", _BOTH),
    _row("llava", "llava", r".*language_model.*(q_proj|v_proj)", _BOTH, task_type="CAUSAL_LM"),
    _row("qwen2-vl", "qwen2-vl", ["qkv", "q_proj", "v_proj"], _BOTH, task_type="CAUSAL_LM"),
    _row("qwen2.5-vl", "qwen2.5-vl", "all-linear", _BOTH, task_type="CAUSAL_LM"),
    _row("gemma3-vision", "gemma3-vision", "all-linear", _BOTH, task_type="CAUSAL_LM"),
    _row("paligemma", "paligemma", ["q_proj", "o_proj", "k_proj", "v_proj"], _BOTH, task_type="CAUSAL_LM"),
    _row("florence2", "florence2", ["q_proj", "v_proj"], _BOTH),
)
