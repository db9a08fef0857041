"""Base models in GGUF files: dequantise one, and write it once as a Hugging Face folder.

model.gguf --load_gguf--> model, tokenizer          (slow: every tensor is dequantised and the vocabulary rebuilt)
model.gguf --convert_gguf--> folder of safetensors  (then loading takes a second)
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import torch

from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.load import load_gguf, quiet_loading
from icmlora.errors import OutputExists
from icmlora.io.staging import building_folder


def convert_gguf(source: Path, directory: Path, *, label: str) -> Path:
    """Write a GGUF base model as a float32 Hugging Face folder; raise `OutputExists` if the folder is not empty."""
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
