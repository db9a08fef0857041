"""PEFT LoRA folders: adapter_config.json + adapter_model.safetensors + README.md.

What is written is the one form that every engine reads alike: one rank for all modules (padded with zeros), the scale
folded into B, alpha equal to the rank, no patterns, literal target modules.

Checking and decoding are imported by the methods that need them: to write an original back, the file names are enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.adapter.layout import PEFT_PREFIX
from icmlora.errors import AdapterRefused, located
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterPaths,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    LoadedAdapter,
)

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter, LoraModule
    from icmlora.formats.tree import Folder
    from icmlora.io.safetensors import RawTensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

# vLLM and SGLang reserve space for ranks of 8, 16, 32, 64, ...
_SMALLEST_RANK = 8


class PeftFormat:
    """The format of PEFT's `save_pretrained`, restricted to plain LoRA on linear layers."""

    name = "peft"
    watched = frozenset({CONFIG_NAME, WEIGHTS_NAME, CARD_NAME})

    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Find the adapter of a folder; there is at most one."""
        files = folder.files
        if CONFIG_NAME not in files or WEIGHTS_NAME not in files:
            return []
        return [AdapterPaths(folder.path, files[WEIGHTS_NAME], files[CONFIG_NAME], files.get(CARD_NAME))]

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Report a configuration without weights."""
        if CONFIG_NAME not in folder.files:
            return []
        hint = f"copy {WEIGHTS_NAME} into the same folder"
        path = folder.files[CONFIG_NAME].parent
        return [AdapterRefused(f"there is no {WEIGHTS_NAME}", kind="no-weights", path=path, hint=hint)]

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read `adapter_config.json`."""
        from icmlora.formats.peft_config import AdapterConfig

        parsed = AdapterConfig.parse(config)
        return ConfigFacts(parsed.base_model, parsed.revision, parsed.task_type)

    def inspect(self, config: bytes, weights: Buffer, *, path: str | Path | None = None) -> AdapterSummary:
        """Check an adapter's two files and summarise them."""
        from icmlora.formats.peft_check import check_adapter

        return check_adapter(config, weights, path=path).summary

    def read(self, config: bytes, weights: bytes, *, path: str | Path | None = None) -> LoadedAdapter:
        """Read an adapter. It never has extras: what a code cannot represent is refused."""
        from icmlora.adapter.model import Adapter, LoraModule
        from icmlora.formats.peft_check import check_adapter
        from icmlora.io.safetensors import read_header
        from icmlora.io.tensors import decode_float32

        checked = check_adapter(config, weights, path=path)
        with located(path):
            tensors = decode_float32(weights, read_header(weights))
            modules = []
            for pair in checked.pairs:
                # The scale goes into B, as A may be the initial one, whose bits the seed search needs.
                b = tensors[pair.b.name] * checked.config.scale_of(pair.module)
                modules.append(LoraModule(pair.module, tensors[pair.a.name], b))
            _check_scaled(modules)
        facts = checked.summary
        return LoadedAdapter(
            Adapter(facts.base_model, facts.task_type, facts.target_modules, tuple(modules), facts.revision)
        )

    def encode(
        self,
        adapter: Adapter,
        *,
        dtype: str,
        card: str,
        metadata: Mapping[str, str],
        extras: Mapping[str, RawTensor] | None = None,
    ) -> AdapterBytes:
        """Write an adapter's three files."""
        # bfloat16 keeps float32's range and 8 significant bits (relative error up to 2^-9 per value); float16 keeps 11
        # bits but ends at 65504, which is refused rather than rounded to infinity.
        from torch.nn.functional import pad

        from icmlora.io.tensors import encode_torch

        if extras:
            raise AdapterRefused(f"{next(iter(extras))} cannot be written as PEFT", kind="extras")
        # Engines disagree on patterns and on alpha: one rank for all modules and alpha == rank mean the same to all.
        rank = _written_rank(adapter)
        tensors = {}
        for module in adapter.modules:
            missing = rank - module.a.shape[0]
            tensors[f"{PEFT_PREFIX}{module.name}.lora_A.weight"] = pad(module.a, (0, 0, 0, missing))  # (rank, in)
            tensors[f"{PEFT_PREFIX}{module.name}.lora_B.weight"] = pad(module.b, (0, missing))  # (out, rank)
        weights = encode_torch(tensors, {"format": "pt", **metadata}, dtype=dtype)
        return AdapterBytes(weights, _config(adapter, rank), card.encode())

    def lay_out(self, files: AdapterBytes) -> dict[str, bytes]:
        """Name the files as PEFT does; without its configuration a folder is not an adapter, so that comes last."""
        card = {} if files.card is None else {CARD_NAME: files.card}
        return {WEIGHTS_NAME: files.weights, **card, CONFIG_NAME: files.config}


PEFT: AdapterFormat = PeftFormat()


def _check_scaled(modules: list[LoraModule]) -> None:
    for module in modules:
        if not module.b.isfinite().all():
            message = f"{module.name}: B times the scale exceeds float32"
            raise AdapterRefused(message, kind="overflow", hint="the training run diverged: take an earlier checkpoint")


def _written_rank(adapter: Adapter) -> int:
    largest = max(module.a.shape[0] for module in adapter.modules)
    return max(_SMALLEST_RANK, 1 << (largest - 1).bit_length())


def _config(adapter: Adapter, rank: int) -> bytes:
    fields = {
        "alpha_pattern": {},
        "base_model_name_or_path": adapter.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": adapter.revision,
        "target_modules": list(adapter.target_modules),
        "task_type": adapter.task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
