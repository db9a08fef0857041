"""Which base model an image adapter is for, from its own tensors or else from its header.

Adapters of one architecture fit all of its checkpoints, so the label is that of the architecture, as the modelspec
standard spells it (github.com/Stability-AI/ModelSpec). On which checkpoint it was trained stays in its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from icmlora.formats.single_file_names import Factors

# The width that keys and values of cross-attention read: that of the text encoders' output.
_CROSS_ATTENTION = re.compile(r".*attn2[._]to_[kv]")
_CONTEXT = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2", 2048: "stable-diffusion-xl-v1-base"}
# The first of the blocks that Flux alone has; its width tells it from smaller relatives.
_FLUX = re.compile(r".*(double_blocks|single_transformer_blocks)[._]\d+[._].*(img_attn[._]qkv|to_q|qkv_lora1)")
_FLUX_WIDTH = 3072
# What trainers note, where it is not the label itself. modelspec has the label, then the kind of adapter: `.../lora`.
_VERSIONS = (
    ("sdxl", "stable-diffusion-xl-v1-base"),
    ("sd_v1", "stable-diffusion-v1"),
    ("sd_v2", "stable-diffusion-v2"),
    ("flux1", "flux-1-dev"),
    ("flux.1", "flux-1-dev"),
    ("sd3", "stable-diffusion-3"),
)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,80}")


def label_of(metadata: Mapping[str, str], factors: Sequence[Factors]) -> str | None:
    """Return the label of an adapter's base model, or None if nothing says what it is."""
    for one in factors:
        shape = one.shape
        if _CROSS_ATTENTION.fullmatch(shape.module) and shape.inputs in _CONTEXT:
            return _CONTEXT[shape.inputs]
        if shape.inputs == _FLUX_WIDTH and _FLUX.fullmatch(shape.module):
            return "flux-1-dev"
    stated = metadata.get("modelspec.architecture", "").partition("/")[0]
    if _LABEL.fullmatch(stated):
        return "stable-diffusion-v2" if stated.startswith("stable-diffusion-v2") else stated
    version = metadata.get("ss_base_model_version", "")
    known = next((label for start, label in _VERSIONS if version.startswith(start)), None)
    return known or (version if _LABEL.fullmatch(version) and version != "None" else None)
