"""Lend the base model to one adapter and get it back as it was.

    with adapted(base, folder) as model:    base.model + LoRA, through PeftModel.from_pretrained
        ...                                 on leaving: the LoRA layers are taken out, the weights were never touched

The adapter is never merged: merging and subtracting again does not give the same bits back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelMismatch

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def adapted(base: BaseModel, folder: Path) -> Iterator[PeftModel]:
    """Put the adapter in `folder` on the base model inside the block; yields it in evaluation mode."""
    # The folder must be one that this package wrote or checked: PEFT runs patterns of its configuration.
    model = _attach(base, folder)
    try:
        _check_every_tensor_landed(model, base, folder)
        yield model
    finally:
        model.unload()


def _attach(base: BaseModel, folder: Path) -> PeftModel:
    try:
        with warnings.catch_warnings():
            # The first is between the two libraries; the second becomes an error in `_check_every_tensor_landed`.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
            return PeftModel.from_pretrained(base.model, folder, local_files_only=True).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        # The library may have put its layers in before it failed.
        _take_out(base)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        message = f"the adapter cannot be put on base model {base.label!r}: {reason}"
        raise BaseModelMismatch(message, path=folder) from error


def _take_out(base: BaseModel) -> None:
    for name, module in list(base.model.named_modules()):
        if hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(base.model.get_submodule(parent), child, module.base_layer)
    if hasattr(base.model, "peft_config"):
        del base.model.peft_config


def _check_every_tensor_landed(model: PeftModel, base: BaseModel, folder: Path) -> None:
    # A key that matches nothing is dropped by the library, and the adapter would silently be the base model.
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = {name.replace(".default.", ".") for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    # save_embedding_layers: the default "auto" asks the hub for the base model's vocabulary size.
    present = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    stray = sorted(stored ^ present)
    if stray:
        where = "the adapter" if stray[0] in stored else "the adapted model"
        raise BaseModelMismatch(
            f"tensor {stray[0]!r} is only in {where}, of {len(stray)} that do not match base model {base.label!r}",
            path=folder,
        )
