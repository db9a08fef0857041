"""Load a base model's network and processor: offline, quietly, and without running its code.

model.gguf ──load_gguf──▶ model, tokenizer              slow: tensors are dequantised and the vocabulary rebuilt
model.gguf ──convert_gguf──▶ folder of safetensors      afterwards loads in a second
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from icmlora.base_models.finding.fingerprint import fingerprint_base
from icmlora.base_models.finding.lookup import FoundBase, inspect_base
from icmlora.base_models.modality import BaseModel, Modality
from icmlora.base_models.placement import placement, smaller
from icmlora.base_models.quantised import HEADS, settle
from icmlora.errors import BaseModelNotFound, IcmLoraError, OutputExists
from icmlora.io.devices import inference_dtype
from icmlora.io.memory import free, ran_out
from icmlora.io.staging import building_folder
from icmlora.io.text import with_article

_CAUSAL = "causal language model"
_LIBRARY_HINT = "install the library in the message; for models that read video, run: pip install 'icm-lora[video]'"


@dataclass(frozen=True)
class Loaded:
    """A network, its processor, and the parameters missing from its files."""

    model: Any
    processor: Any
    made_up: frozenset[str]


def load_auto(
    found: FoundBase,
    kind: str,
    auto_class: str,
    processor_class: str,
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[str, ...] = HEADS,
) -> Loaded:
    """Load a folder with a transformers Auto class; fill missing head weights with zeros.

    Raises:
        BaseModelNotFound: It cannot be loaded, or other weights are missing.
    """
    with quiet_loading(found, kind):
        # The processor comes first: it may need a library that is not installed, and reading weights is slow.
        processor = getattr(transformers, processor_class).from_pretrained(found.path, **_OFFLINE)
        # The library would fill missing weights with random numbers and only warn.
        placed = placement(found, auto_class, device, dtype)
        loaded: Any = getattr(transformers, auto_class).from_pretrained(
            found.path, use_safetensors=True, output_loading_info=True, **placed, **_OFFLINE
        )
        model, report = loaded
        missing = sorted(report["missing_keys"])
        if stray := [name for name in missing if not name.startswith(heads)]:
            raise ValueError(f"its weight files lack {stray[0]!r} (and {len(stray) - 1} more)")
        for name in missing:
            torch.nn.init.zeros_(model.get_parameter(name))
        if "device_map" not in placed:
            model.to(device)
    if found.load_in is not None:
        settle(model)
    return Loaded(model, processor, frozenset(missing))


_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def base_of(
    found: FoundBase,
    modality: Modality[Any, Any],
    network: Callable[[torch.device, torch.dtype], Loaded],
    device: torch.device | None,
    dtype: torch.dtype | None,
    fingerprint: str | None,
) -> BaseModel:
    """Load a network and build its base model, by default on the CPU and in the device's default precision."""
    device = device or torch.device("cpu")
    precision = dtype or inference_dtype(device)
    loaded = network(device, precision if found.load_in is None else torch.bfloat16)
    # Frozen, or every backward pass would keep a gradient as large as the model; evaluation mode turns off dropout.
    loaded.model.requires_grad_(False).train(False)
    with quiet_loading(found, modality.name):  # configurations may lack fields or name them differently
        return BaseModel(
            label=found.label,
            model=loaded.model,
            processor=loaded.processor,
            fingerprint=fingerprint or fingerprint_base(found),
            modality=modality,
            hidden_size=_hidden_size(loaded.model.config),
            layers=_layers(loaded.model.config),
            positions=positions_of(loaded.model),
            made_up=loaded.made_up,
            load_in=found.load_in,
        )


def load_network(found: FoundBase, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load a causal language model from a Hugging Face folder or a GGUF file."""
    if not found.is_gguf:
        return load_auto(found, _CAUSAL, "AutoModelForCausalLM", "AutoTokenizer", device, dtype, heads=())
    with quiet_loading(found):
        model, tokenizer = load_gguf(found.path, dtype)
        model.to(device)  # type: ignore[arg-type]  # the stub wants a string
    return Loaded(model, tokenizer, frozenset())


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
        _make_durable(work)
    return directory


def _make_durable(folder: Path) -> None:
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.iterdir():
        file.chmod(mode)  # the library sets the weights to 0600, regardless of the umask
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


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
    learned = [
        _usable_rows(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and _is_of_positions(name)
    ]
    return min([*stated, *learned], default=None)


def _is_of_positions(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in ("wpe", "embed_positions") or last.startswith("position_embedding")


def _usable_rows(table: torch.nn.Embedding) -> int:
    # Some models reserve leading rows: OPT two, RoBERTa all up to its padding index.
    padding = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - max(padding, int(getattr(table, "offset", 0)))


def _hidden_size(config: Any) -> int | None:
    """Return the width of the last layer; None if the configuration does not state it (MobileNet)."""
    found = _stated((config.get_text_config(decoder=True), config), ("hidden_size", "d_model"))
    several = getattr(config, "hidden_sizes", None)
    return int(several[-1]) if found is None and several else found


def _layers(config: Any) -> int:
    found = _stated((config.get_text_config(decoder=True),), ("num_hidden_layers", "decoder_layers", "num_layers"))
    return (len(getattr(config, "depths", ())) or 1) if found is None else found


def _stated(places: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    """Return the first integer among the named attributes of the configurations."""
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int)), None)
