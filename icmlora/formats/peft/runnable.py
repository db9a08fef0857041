"""Map the tensors of a PEFT adapter to the base model, to run the adapter without its configuration.

PEFT treats names in a configuration as regular expressions. Here, tensor names determine the modules.

    M.lora_magnitude_vector                      DoRA: the length of each row of W + dW
    M.lora_B.bias                                added to the output of B, then scaled
    M.token_adapter.trainable_tokens_delta       rows of an embedding (the rows themselves, not a difference)
    M.weight, M.base_layer.bias, ...             whole parameters: heads, embeddings, biases, copies of base layers

Sources: huggingface/peft, tuners/lora/layer.py and utils/other.py; DoRA, Liu et al. 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load

from icmlora.errors import AdapterRefused
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.peft.config import PREFIX, AdapterConfig, fields_of
from icmlora.formats.peft.names import unwrapped
from icmlora.formats.peft.tensors import read_adapter
from icmlora.io.safetensors import encode
from registry.names import escape

_KINDS = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<magnitude>lora_magnitude_vector(\.default)?(\.weight)?)"
    r"|(?P<bias>lora_B(\.default)?\.bias)"
    r"|(?P<rows>(token_adapter\.)?trainable_tokens_delta(\.default)?)"
    r"|(?P<other>lora_\w+(\..*)?)"
    r")"
)
# Segments that PEFT inserts into the name of a wrapped module.
_WRAPPING = re.compile(r"\.(base_layer|original_module|modules_to_save(\.default)?)(?=\.)")
_CANNOT_RUN = {
    "alora_invocation_tokens": "it acts only after its invocation tokens (aLoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
    "layer_replication": "it repeats layers of its base model (layer_replication)",
}
_EVALUATE = "write it with `icm materialize` and evaluate it where it was trained"


def read_runnable(config: bytes, weights: bytes) -> RunnableAdapter:
    """Read an adapter, and sort its extras by their effect.

    Raises:
        AdapterRefused: icm cannot run this kind of adapter.
    """
    fields = fields_of(config)
    for field, what in _CANNOT_RUN.items():
        if fields.get(field):
            raise AdapterRefused(f"icm cannot run it: {what}", kind="cannot-run", hint=_EVALUATE)
    loaded, parsed = read_adapter(config, weights), AdapterConfig.parse(config)
    values: dict[str, torch.Tensor] = {}
    rows: dict[str, tuple[Sequence[int], torch.Tensor]] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    for name, tensor in load(encode(loaded.extras, {})).items():
        inner = unwrapped(name)
        if not inner.startswith(PREFIX):
            raise AdapterRefused(f"icm cannot run it: it has a tensor {name}", kind="cannot-run")
        inner = inner.removeprefix(PREFIX)
        kind = _KINDS.fullmatch(inner)
        if kind is None:
            values[_WRAPPING.sub("", inner)] = tensor
        elif kind["magnitude"]:
            magnitudes[kind["module"]] = tensor
        elif kind["bias"]:
            biases[kind["module"]] = tensor.float() * parsed.scale_of(kind["module"])
        elif kind["rows"]:
            module = _WRAPPING.sub("", kind["module"] + ".").removesuffix(".")
            rows[module] = _row_numbers(fields, module, tensor), tensor
        else:
            raise AdapterRefused(f"icm cannot run it: it has a tensor {name}", kind="cannot-run")
    modules = {module.name for module in loaded.adapter.modules}
    if (magnitudes or fields.get("use_dora")) and (odd := min(modules ^ magnitudes.keys(), default=None)):
        fact = f"DoRA needs factors and a magnitude for each module, but {odd} has only one of the two"
        raise AdapterRefused(fact, kind="missing-half")
    return RunnableAdapter(loaded.adapter, values, rows, magnitudes, biases)


def _row_numbers(fields: Mapping[str, Any], module: str, rows: torch.Tensor) -> Sequence[int]:
    """Return the indices of an embedding's trained rows."""
    stated = fields.get("trainable_token_indices")
    if isinstance(stated, dict):
        stated = next((numbers for key, numbers in stated.items() if f".{module}".endswith(f".{key}")), None)
    if (
        not isinstance(stated, list)
        or len(stated) != rows.shape[0]
        or not all(type(number) is int and number >= 0 for number in stated)
    ):
        fact = f"trainable_token_indices does not identify the {rows.shape[0]} rows of {escape(module, 120)}"
        raise AdapterRefused(fact, kind="config")
    return stated
