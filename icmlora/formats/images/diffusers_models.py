"""Module names of diffusers' own models, for checking adapters in diffusers' names.

The models are built without weights (torch's "meta" device), which takes some hundredths of a second. Any block number
is accepted, because models of one family differ in depth.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from icmlora.errors import DataError
from icmlora.formats.images.families import UNET, Family

_BLOCK = re.compile(r"((?:blocks|layers|refiner)[._])(\d+)(?=[._])")
_UNET_BLOCK = re.compile(r"((?:transformer_blocks|layers)[._])(\d+)(?=[._])")  # its other blocks differ
_TEXT_MODEL = re.compile(r"text_model[._]")


class ModuleNames:
    """Module names of a model, with lookup by dotted or flattened name."""

    def __init__(self, names: Iterable[str], block: re.Pattern[str]) -> None:
        self._block = block
        self._dotted = {block.sub(r"\1#", name) for name in names}
        self._flat = {name.replace(".", "_"): name for name in self._dotted}

    def find(self, name: str) -> str | None:
        """Return the model's name of a module; None if it has no such module.

        Args:
            name: The name, or the name with "_" for every dot.
        """
        numbers = iter([match[2] for match in self._block.finditer(name)])
        pattern = self._block.sub(r"\1#", name)
        found = pattern if pattern in self._dotted else self._flat.get(pattern.replace(".", "_"))
        return None if found is None else re.sub("#", lambda _: next(numbers), found)


@cache
def modules_of(family: Family) -> ModuleNames:
    """Return the module names of a family's model.

    Raises:
        DataError: diffusers is not installed, or lacks the model.
    """
    if family.model is None:
        return ModuleNames((), _BLOCK)
    model = getattr(from_diffusers(), family.model, None)
    if model is None:
        hint = "install a newer one: pip install -U 'icm-lora[diffusion]'"
        raise DataError(f"the installed diffusers has no {family.model}", hint=hint)
    return ModuleNames(_layers(lambda: model(**family.options)), _UNET_BLOCK if family.model == UNET else _BLOCK)


@cache
def modules_of_clip() -> ModuleNames:
    """Return the module names of CLIP's text encoder, without `text_model.`, which newer transformers dropped."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    names = _layers(lambda: CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=1)))
    return ModuleNames((_TEXT_MODEL.sub("", name) for name in names), _BLOCK)


def clip_name(name: str) -> str | None:
    """Return diffusers' name of a module of CLIP's text encoder; None if it has no such module."""
    found = modules_of_clip().find(_TEXT_MODEL.sub("", name, count=1))
    if found is None or found.startswith("text_projection"):
        return found
    return f"text_model.{found}"


def from_diffusers(module: str = "") -> Any:
    """Import diffusers, or a module of it.

    Raises:
        DataError: It is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"diffusers.{module}" if module else "diffusers")
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[diffusion]'"
        raise DataError("renaming image adapters needs diffusers, which is not installed", hint=hint) from error


def _layers(make: Callable[[], Any]) -> list[str]:
    """Return the names of the layers that LoRA can adapt: linear layers, convolutions and embeddings."""
    import torch
    from torch import nn

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns about its own internals
        model = make()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
