"""Files with the module names of the original models, as ComfyUI and ai-toolkit name them: Flux, Wan and others.

    diffusion_model.blocks.0.self_attn.q.lora_A.weight      text_encoders.clip_l.transformer....lora_down.weight

Source: comfyanonymous/ComfyUI, comfy/lora.py; ostris/ai-toolkit.
"""

from __future__ import annotations

import re

from icmlora.formats.single_file import SingleFileFormat
from icmlora.formats.single_file_names import Naming, Style

_STEM = re.compile(r"(model\.)?(diffusion_model|text_encoders|clip_[a-z]|t5xxl|conditioner)\..+")
_NAMING = Naming(
    _STEM,
    (
        Style("{}.lora_A.weight", "{}.lora_B.weight"),
        Style("{}.lora_down.weight", "{}.lora_up.weight"),
        Style("{}.lora.down.weight", "{}.lora.up.weight"),
    ),
)
COMFYUI = SingleFileFormat("comfyui", "one file with the names of ComfyUI and ai-toolkit", _NAMING)
