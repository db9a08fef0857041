"""Small GGUF adapters as llama.cpp's own package writes them, and their headers."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch

from icmlora.formats.pairs.gguf_file import GgufValue, encode_values

Q0 = "blk.0.attn_q"
DOWN1 = "blk.1.ffn_down"
LABEL = "acme/llama"


def random_tensors(rank: int = 2, seed: int = 0, **others: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the factors of two modules, A (r, 8) and B (6, r), and other tensors by name."""
    random = torch.Generator().manual_seed(seed)
    shapes = {f"{name}.weight.lora_{half}": shape for name in (Q0, DOWN1) for half, shape in _halves(rank)}
    return {name: torch.randn(shape, generator=random) for name, shape in (shapes | others).items()}


def _halves(rank: int) -> list[tuple[str, tuple[int, int]]]:
    return [("a", (rank, 8)), ("b", (6, rank))]


def gguf_file(
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    architecture: str = "llama",
    general_type: str = "adapter",
    alpha: float | None = 4.0,
    kind: gguf.GGMLQuantizationType | None = None,
    **texts: str,
) -> bytes:
    """Return a file with llama.cpp's keys.

    Args:
        tensors: By name; a random adapter of rank 2 by default.
        architecture: Of the base model.
        general_type: What the file says it is.
        alpha: `adapter.lora.alpha`; None for a file without.
        kind: How tensors are stored; float32 by default.
        texts: Keys with `__` for dots.
    """
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_string("general.type", general_type)
    writer.add_string("adapter.type", texts.pop("adapter__type", "lora"))
    writer.add_base_model_count(1)
    writer.add_string("general.base_model.0.name", texts.pop("base", LABEL))
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_array("general.tags", ["lora", "transformers"])
    for key, text in texts.items():
        writer.add_string(key.replace("__", "."), text)
    for name, tensor in (random_tensors() if tensors is None else tensors).items():
        values: Any = tensor.numpy()
        if kind is not None:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def gguf_details(base: str) -> str:
    """Return what is noted of the form of a plain adapter: its keys, with the base model's name."""
    texts = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    values = {key: text_value(text) for key, text in {**texts, "general.base_model.0.name": base}.items()}
    return json.dumps({"header": base64.b64encode(encode_values(values)).decode()})


def text_value(text: str) -> GgufValue:
    """Return a text as a value of a header."""
    data = text.encode()
    return GgufValue(8, len(data).to_bytes(8, "little") + data)
