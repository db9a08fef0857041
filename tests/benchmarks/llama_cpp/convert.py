"""Convert a model with llama.cpp's own converter: `convert.py MODEL FILE.gguf`, with llama.cpp's sources on the path.

Of the tokenizer only the number of tokens matters here, so its rules are not looked up.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def convert(folder: Path, target: Path) -> None:
    """Write a GGUF file in float32."""
    package: Any = import_module("conversion")
    base: Any = import_module("conversion.base")
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind = package.get_model_class(name)
    patched = {"set_vocab": lambda self: self._set_vocab_gpt2(), "get_vocab_base": _tokens}
    made = type(kind.__name__, (kind,), {"model_arch": kind.model_arch, **patched})
    with torch.inference_mode():
        made(folder, base.gguf.LlamaFileType.ALL_F32, target).write()


def _tokens(model: Any) -> tuple[list[str], list[int], str]:
    """Return tokens, their types and the name of a rule that splits texts into words."""
    count = model.find_hparam(["vocab_size"])
    return [f"w{number:03}" for number in range(count)], [1] * count, "gpt-2"


if __name__ == "__main__":
    logging.disable(logging.INFO)
    convert(*map(Path, sys.argv[1:]))
