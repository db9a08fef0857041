"""Calling the model loaders of transformers: silently, and with one error instead of whatever they run into.

Base models in GGUF files: dequantise one, and write it down once as a Hugging Face folder.

model.gguf --load_gguf--> model, tokenizer          (slow: every tensor is dequantised and the vocabulary rebuilt)
--convert_gguf--> folder of safetensors  (then loading takes a second)
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from icmlora.base_models.lookup import FoundBase, inspect_base
from icmlora.errors import BaseModelNotFound, OutputExists
from icmlora.io.staging import building_folder


@contextmanager
def quiet_loading(found: FoundBase) -> Iterator[None]:
    """Load without progress bars of the library; turn its many exceptions into `BaseModelNotFound`."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # The GGUF reader draws its own bar on stderr whatever the library's setting is.
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        # Deliberately broad: for a damaged file the loaders raise whatever their parsing runs into.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelNotFound(
            f"base model {found.label!r} cannot be loaded as a causal language model: {first}",
            path=found.path,
            hint="the folder must be a complete text model that transformers knows, with its tokenizer",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a GGUF file, dequantised to `dtype`.

    Raises:
        OSError, ValueError, ImportError: What transformers raises for a file it cannot read; `convert_gguf` and
            `load_base_model` turn them into `BaseModelNotFound`.
    """
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
    """Write a GGUF base model as a float32 Hugging Face folder.

    Args:
        source: The `.gguf` file.
        directory: The folder to make; it appears complete or not at all.
        label: The name the adapters use, for messages.

    Returns:
        `directory`.

    Raises:
        BaseModelNotFound: The file is no GGUF file that transformers can read.
        OutputExists: `directory` exists and is not empty, or another process made it meanwhile.
    """
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
