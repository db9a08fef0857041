"""Load a causal language model from a Hugging Face folder or a GGUF file: offline, and without running its code."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from icmlora.base_models.causal_lm import CausalLM
from icmlora.base_models.fingerprint import fingerprint_base
from icmlora.base_models.gguf import load_gguf
from icmlora.base_models.lookup import FoundBase
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.quiet import quiet_loading
from icmlora.io.devices import inference_dtype


def load_base_model(
    found: FoundBase,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
) -> BaseModel:
    """Load a base model that `find_base_model` found."""
    device = device or torch.device("cpu")
    with quiet_loading(found):
        if found.is_gguf:
            model, tokenizer = load_gguf(found.path, dtype or inference_dtype(device))
        else:
            model, tokenizer = _load_folder(found, dtype or inference_dtype(device))
    # Frozen, or every backward pass would keep a gradient as large as the model; no dropout.
    model.requires_grad_(False).train(False).to(device)
    sizes = model.config.get_text_config()
    return BaseModel(
        label=found.label,
        model=model,
        processor=tokenizer,
        fingerprint=fingerprint or fingerprint_base(found),
        modality=CausalLM(),
        hidden_size=int(sizes.hidden_size),
        layers=int(sizes.num_hidden_layers),
    )


def _load_folder(found: FoundBase, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # The stub does not know the pair that output_loading_info gives.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = loaded
    # The library would fill missing weights with random numbers and only warn.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weight files lack {missing[0]!r} (and {len(missing) - 1} more)")
    return model, AutoTokenizer.from_pretrained(found.path, **options)
