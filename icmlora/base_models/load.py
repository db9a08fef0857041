"""What loading a base model with transformers takes: no network, no output, and no code from its folder.

model.gguf ──load_gguf──▶ model, tokenizer              slow: tensors are dequantised and the vocabulary rebuilt
model.gguf ──convert_gguf──▶ folder of safetensors      afterwards loads in a second
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

from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.placement import smaller
from icmlora.errors import BaseModelNotFound, IcmLoraError, OutputExists
from icmlora.io.memory import free, ran_out
from icmlora.io.staging import building_folder
from icmlora.io.text import with_article

_CAUSAL = "causal language model"
_LIBRARY_HINT = "install the library in the message; for models that read video, run: pip install 'icm-lora[video]'"


OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and tokenizer of a GGUF file, dequantised to `dtype`."""
    # Exceptions from transformers pass through; callers use `quiet_loading`.
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    # The tensors are dequantised, but the model is still marked as quantised, which blocks saving and misleads peft.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model, tokenizer


def convert_gguf(source: Path, directory: Path, *, label: str) -> Path:
    """Write a GGUF base model as a float32 Hugging Face folder; raise `OutputExists` if the folder is not empty."""
    found = inspect_base(label, source)
    if directory.exists() and any(directory.iterdir()):
        fact = "the folder for the converted base model is not empty"
        raise OutputExists(fact, path=directory, hint="choose another folder")
    with building_folder(directory) as work:
        with quiet_loading(found):
            model, tokenizer = load_gguf(found.path, torch.float32)
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
        mode = stat.S_IMODE((work / "config.json").stat().st_mode)
        for file in work.iterdir():
            file.chmod(mode)  # the library sets the weights to 0600, regardless of the umask
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    return directory


@contextmanager
def quiet_loading(found: FoundBase, kind: str = _CAUSAL, library: str = "transformers") -> Iterator[None]:
    """Suppress the library's progress bars inside the block; convert its exceptions to `BaseModelNotFound`."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # The GGUF reader draws its own bar on stderr, regardless of the library's setting.
        with redirect_stderr(io.StringIO()):
            yield
    except IcmLoraError:
        raise
    except Exception as error:
        if ran_out(error):
            free(error)
            fact = f"base model {found.label!r} does not fit into memory"
            raise BaseModelNotFound(fact, path=found.path, hint=smaller(found)) from error
        # Deliberately broad: for a damaged file, the loaders may raise any exception.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fact = f"base model {found.label!r} cannot be loaded as {with_article(kind)}: {first}"
        hint = f"use a complete model folder that {library} supports, with its tokenizer or processor"
        hint = _LIBRARY_HINT if isinstance(error, ImportError) else hint
        raise BaseModelNotFound(fact, path=found.path, hint=hint) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# Configuration keys for the maximum number of positions.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read; None if there is no limit."""
    config = model.config.get_text_config()
    stated = [value for name in _POSITIONS if isinstance(value := getattr(config, name, None), int) and value > 0]
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_of_positions = last in ("wpe", "embed_positions") or last.startswith("position_embedding")
        if is_of_positions and isinstance(module, torch.nn.Embedding):
            # Some models reserve leading rows: OPT two, RoBERTa all up to its padding index.
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            stated.append(module.num_embeddings - max(padding, int(getattr(module, "offset", 0))))
    return min(stated, default=None)


def hidden_size_of(config: Any) -> int | None:
    """Return the width of the last layer; None if the configuration does not state it (MobileNet)."""
    found = _stated((config.get_text_config(decoder=True), config), ("hidden_size", "d_model"))
    several = getattr(config, "hidden_sizes", None)
    return int(several[-1]) if found is None and several else found


def layers_of(config: Any) -> int:
    """Return the number of layers; 1 if the configuration does not state it."""
    found = _stated((config.get_text_config(decoder=True),), ("num_hidden_layers", "decoder_layers", "num_layers"))
    return (len(getattr(config, "depths", ())) or 1) if found is None else found


def _stated(places: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int)), None)
