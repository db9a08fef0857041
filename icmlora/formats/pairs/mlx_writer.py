"""Adapters for MLX-LM: adapters.safetensors and adapter_config.json, as `mlx_lm.lora` writes them.

    model.layers.0.self_attn.q_proj   A (r, in)  ──▶  ….lora_a (in, r)
                                      B (out, r) ──▶  ….lora_b (r, out)
                                      DoRA's row lengths ──▶  ….m (out,)

    what MLX-LM adds:  y = scale * (x @ lora_a) @ lora_b,   one scale and one r in the configuration

MLX-LM keeps the weights of transformers in their order and, inside of the blocks, mostly under their names; it refuses
to load an adapter with a module that the model does not have.

Source: ml-explore/mlx-lm, tuner/lora.py and tuner/dora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from torch.nn.functional import pad

from icmlora.errors import AdapterRefused
from icmlora.formats.format import AdapterBytes, RunnableAdapter
from icmlora.io.safetensors import RawTensor, encode
from icmlora.io.tensors import dtype_name, raw_tensor
from registry.names import escape

# MLX-LM looks for the key in each block. It computes experts together, from one tensor.
_MODULE = re.compile(
    r"(?P<model>model\.|model\.language_model\.|language_model\.model\.)(?P<block>layers\.\d+)\."
    r"(?P<key>(?!.*\.\d+(\.|$)).+)"
)


def encode_mlx(adapter: RunnableAdapter, *, metadata: Mapping[str, str], dtype: str = "float32") -> AdapterBytes:
    """Write an adapter as weights and configuration; the same arguments give the same bytes.

    Args:
        adapter: What to write.
        metadata: Short facts for the header of the weights.
        dtype: "bfloat16", "float16" or "float32", in which MLX-LM trains by default.

    Raises:
        AdapterRefused: It has something that MLX-LM has no place for, or a value that the type cannot hold.
    """
    other = replace(adapter, magnitudes={}).beyond_lora()
    if other is not None:
        fact = f"an MLX adapter holds LoRA factors and DoRA magnitudes only, and it also has {other}"
        raise AdapterRefused(fact, kind="extras", hint="write it with --format peft, and merge it with PEFT")
    modules, kind = adapter.adapter.modules, dtype_name(dtype)
    rank = max(module.a.shape[0] for module in modules)  # the others are filled up with zeros
    keys: set[str] = set()
    tensors: dict[str, RawTensor] = {}
    for module in modules:
        place, key = _place(module.name)
        missing = rank - module.a.shape[0]
        values = {"lora_a": pad(module.a, (0, 0, 0, missing)).T, "lora_b": pad(module.b, (0, missing)).T}
        if module.name in adapter.magnitudes:
            values["m"] = adapter.magnitudes[module.name]
        named = {f"{place}.{key}.{leaf}": value for leaf, value in values.items()}
        if named.keys() & tensors.keys():
            raise AdapterRefused(f"two modules would both be {place}.{key}", kind="layers")
        tensors |= {name: raw_tensor(name, value, kind) for name, value in named.items()}
        keys.add(key)
    return AdapterBytes(encode(tensors, {"format": "mlx", **metadata}), _config(adapter, rank, sorted(keys)))


def _place(module: str) -> tuple[str, str]:
    """Return the name of a module's block in MLX-LM, and that of the module inside of the block."""
    match = _MODULE.fullmatch(module)
    if match is None:
        fact = f"{escape(module, 120)}: an MLX adapter has no place for this module"
        raise AdapterRefused(fact, kind="layers", hint="it holds linear layers named model.layers.N.…, no experts")
    # Where a text model is a part of a larger one, MLX-LM has its own place for it.
    model = "model" if match["model"] == "model." else "language_model.model"
    return f"{model}.{match['block']}", match["key"]


def _config(adapter: RunnableAdapter, rank: int, keys: list[str]) -> bytes:
    fields = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        # The scale is in lora_b already. Some readers of this file know no scale, which is the same then.
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": rank, "scale": 1.0},
        "model": adapter.adapter.base_model,
        "num_layers": -1,  # all; a module without tensors in the file adds nothing
    }
    return (json.dumps(fields, indent=4, sort_keys=True) + "\n").encode()
