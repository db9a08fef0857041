"""Files of diffusers: `pytorch_lora_weights.safetensors`, or the same under another name.

    unet.mid_block.attentions.0.proj_in.lora_A.weight               since 2023, with alphas in the header since 2025
    unet.mid_block.attentions.0.proj_in.lora.down.weight
    text_encoder.text_model....q_proj.lora_linear_layer.down.weight
    unet.mid_block....attn1.processor.to_q_lora.down.weight         the oldest; also without `unet.`

Source: huggingface/diffusers, loaders/lora_pipeline.py and utils/state_dict_utils.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache

from icmlora.errors import AdapterRefused
from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.formats.images.single_file_names import Naming, Style
from icmlora.formats.peft.config import AdapterConfig, with_ranks
from icmlora.io.strict_json import parse_object

_COMPONENTS = r"unet|transformer|transformer_\d|text_encoder|text_encoder_\d|prior|decoder|vae|image_encoder|denoiser"
_STEM = re.compile(rf"(({_COMPONENTS})\.|(down_blocks|mid_block|up_blocks)\..*\bto_(q|k|v|out)).*")
METADATA = "lora_adapter_metadata"
_MAX_METADATA = 1 << 20

_NAMING = Naming(
    _STEM,
    (
        Style("{}.lora_A.weight", "{}.lora_B.weight"),
        Style("{}.lora.down.weight", "{}.lora.up.weight"),
        Style("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight"),
        Style("{parent}.processor.{leaf}_lora.down.weight", "{parent}.processor.{leaf}_lora.up.weight"),
        Style("{}_lora.down.weight", "{}_lora.up.weight"),  # text encoders, as old as the previous style
    ),
)


def scale_of(metadata: Mapping[str, str], module: str, rank: int) -> float:
    """Return the scale of a module from the configuration in the header, or 1 like diffusers.

    Raises:
        AdapterRefused: The configuration states another rank, or is damaged.
    """
    text = metadata.get(METADATA)
    component, _, inner = module.partition(".")
    config = None if text is None else _configs(text).get(component)
    if config is None:
        return 1.0
    if config.rank_of(inner) != rank:
        fact = f"{module} has rank {rank}, but the header's configuration states {config.rank_of(inner)}"
        raise AdapterRefused(fact, kind="rank", hint="save it again with diffusers")
    return config.scale_of(inner)


def restated(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> Mapping[str, str]:
    """Return the metadata with new ranks in its configurations; scales are unchanged."""
    if METADATA not in metadata:
        return metadata
    fields, is_stated = dict(_fields(metadata[METADATA])), True
    for component, config in _configs(metadata[METADATA]).items():
        inner = {
            name.removeprefix(f"{component}."): rank
            for name, rank in ranks.items()
            if name.partition(".")[0] == component
        }
        if all(config.rank_of(name) == rank for name, rank in inner.items()):
            continue
        is_stated = False
        own = json.dumps(fields[component]).encode()
        fields[component] = json.loads(
            with_ranks(own, {name: (rank, config.scale_of(name)) for name, rank in inner.items()})
        )
    if is_stated:
        return metadata
    flat = {f"{component}.{name}": value for component, some in fields.items() for name, value in some.items()}
    return {**metadata, METADATA: json.dumps(flat, indent=2, sort_keys=True)}


@lru_cache(maxsize=4)
def _configs(text: str) -> dict[str, AdapterConfig]:
    """Read the configurations of the components, with fields such as `unet.r` and `unet.lora_alpha`."""
    return {component: AdapterConfig.read(json.dumps(some).encode()) for component, some in _fields(text).items()}


def _fields(text: str) -> dict[str, dict[str, object]]:
    fields: dict[str, dict[str, object]] = {}
    for key, value in parse_object(text.encode(), what=METADATA, max_bytes=_MAX_METADATA).items():
        component, _, name = key.partition(".")
        fields.setdefault(component, {})[name] = value
    return fields


DIFFUSERS = SingleFileFormat(
    "diffusers",
    "one file, as diffusers saves LoRA",
    _NAMING,
    scales=scale_of,
    restated=restated,
    folder_file="pytorch_lora_weights.safetensors",
)
