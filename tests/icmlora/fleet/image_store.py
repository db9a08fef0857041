"""A store of image adapters with their pipeline, everything tiny: three kohya files and a LoHa of LyCORIS."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmlora import Fleet
from tests.icmlora.formats.image_files import kohya_file, lycoris_file
from tests.icmlora.formats.tiny_pipelines import tiny_sd15

LABEL = "stable-diffusion-v1"


def write_images(folder: Path) -> None:
    """Write a pipeline `sd15`, `loras`, and a trained `store` that knows both."""
    tiny_sd15().save_pretrained(folder / "sd15", safe_serialization=True)
    for number, name in enumerate(("apple", "pear", "plum")):
        _varied(folder / "loras" / f"{name}.safetensors", number)
    fleet = Fleet(folder / "store")
    fleet.ingest([folder / "loras"])
    fleet.train(device="cpu", steps=20, refine=0, evaluate=False)
    lycoris_file(folder / "loras" / "loha.safetensors", tiny_sd15().unet, algo="loha")
    fleet.ingest([folder / "loras" / "loha.safetensors"], base_model=LABEL)
    fleet.add_base_model(LABEL, folder / "sd15")


def _varied(path: Path, seed: int) -> None:
    """Write the tiny file of sd-scripts with some noise, so that there are several of them."""
    random = torch.Generator().manual_seed(seed)
    with safe_open(kohya_file("sd15"), "pt") as file:
        metadata = file.metadata()
    tensors = {
        name: value
        if name.endswith("alpha")
        else (value + value.std() * torch.randn(value.shape, generator=random)).to(value.dtype)
        for name, value in load_file(kohya_file("sd15")).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
