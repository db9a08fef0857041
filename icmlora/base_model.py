"""A base model in memory: loaded once, offline, and lent to adapters.

    FoundBase --load_base_model--> BaseModel(model, tokenizer, fingerprint) --check_fits(layout)--> fit for an adapter

Nothing is fetched and no code of the model's folder is run. Weights that the files do not provide are an error, because
the library would fill them with random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from icmlora.base_lookup import FoundBase
from icmlora.device import inference_dtype
from icmlora.errors import BaseModelMismatch
from icmlora.fingerprint import fingerprint_base
from icmlora.gguf_base import load_gguf
from icmlora.loading import quiet_loading


@dataclass(frozen=True)
class BaseModel:
    """A loaded causal language model in evaluation mode.

    Attributes:
        label: The name the adapters use.
        model: The network; adapters are put on it and taken off again, its weights never change.
        tokenizer: Its tokenizer.
        fingerprint: Which weights these are (see `icmlora.fingerprint`).
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, which is the dimension of a task vector."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def layers(self) -> int:
        """Number of transformer layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def dtype(self) -> str:
        """Precision of the weights, as "float32" or "bfloat16"."""
        return str(self.model.dtype).removeprefix("torch.")


def load_base_model(
    found: FoundBase,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
) -> BaseModel:
    """Load a base model that `find_base_model` found.

    Args:
        found: Where it is.
        device: Where to put it; None for the CPU.
        dtype: Precision of the weights; None for what `inference_dtype` chooses for the device.
        fingerprint: The fingerprint, where the caller has it already; None computes it, reading every weight file.

    Raises:
        BaseModelNotFound: The files cannot be loaded as a causal language model, or do not hold all its weights.
    """
    device = device or torch.device("cpu")
    with quiet_loading(found):
        if found.is_gguf:
            model, tokenizer = load_gguf(found.path, dtype or inference_dtype(device))
        else:
            model, tokenizer = _load_folder(found, dtype or inference_dtype(device))
    model.requires_grad_(False).train(False).to(device)
    return BaseModel(found.label, model, tokenizer, fingerprint or fingerprint_base(found))


def check_fits(base: BaseModel, layout: Sequence[tuple[str, int, int, int]]) -> None:
    """Check that every module of an adapter exists in the base model, with its sizes.

    Args:
        base: The base model.
        layout: For each module of the adapter: name, rank, input size, output size.

    Raises:
        BaseModelMismatch: One does not; the message names the first and both shapes.
    """
    modules = dict(base.model.named_modules())
    hint = "name the right base model: icm base add NAME PATH"
    for name, _, inputs, outputs in layout:
        shape = linear_shape(modules.get(name))
        if shape is None:
            fact = "is no linear layer" if name in modules else "does not exist"
            raise BaseModelMismatch(f"module {name!r} of the adapter {fact} in base model {base.label!r}", hint=hint)
        if shape != (outputs, inputs):
            raise BaseModelMismatch(
                f"module {name!r}: the adapter is for a weight of shape {(outputs, inputs)} (out, in), "
                f"base model {base.label!r} has {shape}",
                hint=hint,
            )


def _load_folder(found: FoundBase, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    # The stub does not know the pair that output_loading_info gives.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        found.path, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"its weight files lack {missing[0]!r} (and {len(missing) - 1} more)")
    return model, AutoTokenizer.from_pretrained(found.path, **options)


def linear_shape(module: torch.nn.Module | None) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer; quantised layers and GPT-2's Conv1D have the sizes in attributes."""
    for outputs, inputs in (("out_features", "in_features"), ("nf", "nx")):
        if module is not None and hasattr(module, outputs) and hasattr(module, inputs):
            return int(getattr(module, outputs)), int(getattr(module, inputs))
    return None
