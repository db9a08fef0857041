"""PEFT's other methods, and variants of LoRA that are no factor pairs: kept and listed, but not coded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.compat.bases import base_model, quiet
from tests.compat.building import computed, fresh_model, save, trained
from tests.compat.case import Case

if TYPE_CHECKING:
    import torch

_METHODS = "Other methods of PEFT"
_VARIANTS = "Variants of LoRA"
_QV = ["q_proj", "v_proj"]

# Name of the configuration class of PEFT, and its fields.
_CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"target_modules": _QV, "total_step": 10, "init_r": 6, "target_r": 4}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 8, "target_modules": _QV}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 8, "target_modules": _QV}),
    "ia3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "oft": ("OFTConfig", {"oft_block_size": 8, "target_modules": _QV}),
    "boft": ("BOFTConfig", {"boft_block_size": 8, "target_modules": _QV}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": _QV}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "target_modules": _QV}),
    "randlora": ("RandLoraConfig", {"r": 4, "target_modules": _QV}),
    "vblora": (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 16, "vector_length": 8, "topk": 2, "target_modules": ["q_proj"]},
    ),
    "miss": ("MissConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "c3a": ("C3AConfig", {"block_size": 8, "target_modules": ["q_proj"]}),
    "shira": ("ShiraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "road": ("RoadConfig", {"group_size": 8, "target_modules": ["q_proj"]}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20, "target_modules": ["q_proj"]}),
    "layer-norm-tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "trainable-tokens": ("TrainableTokensConfig", {"token_indices": [4, 5], "target_modules": ["embed_tokens"]}),
    "poly": ("PolyConfig", {"r": 4, "n_tasks": 2, "n_skills": 2, "target_modules": _QV}),
    "adaption-prompt": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    "prefix-tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "prompt-tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4}),
}
# PEFT's own fault, or inputs of more than one kind: these are not run.
_NOT_RUN = {"poly", "adaption-prompt"}


def _method(name: str) -> Case:
    config_name, fields = _CONFIGS[name]

    def build(folder: Path) -> torch.Tensor | None:
        import peft

        config = getattr(peft, config_name)(**fields, task_type="CAUSAL_LM")
        model = trained(config, "llama", name)
        output = None if name in _NOT_RUN else computed(model, "llama")
        save(model, folder, "llama")
        return output

    return Case(name, _METHODS, build, "original", base=None if name in _NOT_RUN else "llama")


def _xlora(folder: Path) -> None:
    """Mix two LoRAs by a classifier; PEFT saves all three."""
    import peft

    for expert in ("a", "b"):
        config = peft.LoraConfig(r=4, target_modules=_QV, task_type="CAUSAL_LM")
        save(trained(config, "llama", expert), folder.with_name(f"{folder.name}-experts") / expert, "llama")
    experts = {name: str(folder.with_name(f"{folder.name}-experts") / name) for name in ("a", "b")}
    model = fresh_model("llama")
    model.config.use_cache = False
    with quiet():
        mixed = peft.get_peft_model(
            model, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=experts)
        )
    save(mixed, folder, "llama")


def _finished_adalora(folder: Path) -> torch.Tensor:
    """Train until AdaLoRA has taken ranks away: the configuration then holds lists of ranks that stay."""
    import peft
    import torch

    config = peft.AdaLoraConfig(
        target_modules=_QV, task_type="CAUSAL_LM", total_step=4, tinit=1, tfinal=1, init_r=6, target_r=3
    )
    model = trained(config, "llama", folder.name)
    inputs = base_model("llama")[1]
    for step in range(4):
        with quiet(), torch.enable_grad():
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        model.base_model.update_and_allocate(step)
    output = computed(model, "llama")
    save(model, folder, "llama")
    return output


def _variant(name: str, field: str, config_name: str) -> Case:
    def build(folder: Path) -> torch.Tensor:
        import peft
        from peft.tuners.lora import config as lora_config

        options = {field: getattr(lora_config, config_name)()}
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=_QV, task_type="CAUSAL_LM", **options)
        model = trained(config, "llama", name)
        output = computed(model, "llama")
        save(model, folder, "llama")
        return output

    return Case(name, _VARIANTS, build, "original")


CASES: tuple[Case, ...] = (
    *(_method(name) for name in _CONFIGS),
    Case("adalora-finished", _METHODS, _finished_adalora, "original", "ranks were taken away"),
    _variant("kasa", "kasa_config", "KasaConfig"),
    _variant("monteclora", "monteclora_config", "MontecloraConfig"),
    _variant("velora", "velora_config", "VeloraConfig"),
)
