"""Files of XLabs' trainer for Flux.

    double_blocks.0.processor.qkv_lora1.down.weight    qkv of the image; `lora2` is the text, `proj_lora1` the output

Source: XLabs-AI/x-flux; huggingface/diffusers, loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re

from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.formats.images.single_file_names import Naming, Style

_STEM = re.compile(r"(diffusion_model\.)?(double_blocks|single_blocks)\.\d+\.processor\.(qkv|proj)_lora\d?")
_NAMING = Naming(_STEM, (Style("{}.down.weight", "{}.up.weight"),))
XLABS = SingleFileFormat("xlabs", "one file, as XLabs' trainer saves LoRA for Flux", _NAMING)
