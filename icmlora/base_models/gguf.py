"""Base models in GGUF files: dequantise one, and write it once as a Hugging Face folder.

model.gguf --load_gguf--> model, tokenizer          (slow: every tensor is dequantised and the vocabulary rebuilt)
model.gguf --convert_gguf--> folder of safetensors  (then loading takes a second)
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from icmlora.base_models.lookup import inspect_base
from icmlora.base_models.quiet import quiet_loading
from icmlora.errors import OutputExists
from icmlora.io.staging import building_folder


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a GGUF file, dequantised to `dtype`."""
    # Raises what transformers raises; the callers run it inside `quiet_loading`.
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # The tensors are plain by now, but the model is still marked as quantised, which refuses saving and misleads peft.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def convert_gguf(source: Path, directory: Path, *, label: str) -> Path:
    """Write a GGUF base model as a float32 Hugging Face folder."""
    found = inspect_base(label, source)
    if directory.exists() and any(directory.iterdir()):
        raise OutputExists(
            "the folder for the converted base model is not empty", path=directory, hint="choose another folder"
        )
    with building_folder(directory) as work:
        with quiet_loading(found):
            model, tokenizer = load_gguf(found.path, torch.float32)
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        _make_durable(work)
    return directory


def _make_durable(folder: Path) -> None:
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.iterdir():
        file.chmod(mode)  # the library leaves the weights at 0600, whatever the umask
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
