"""Files of kohya's sd-scripts and the many programs that use the same format: LoRA and LoCon.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    also lora_te_, lora_te1_, lora_te2_ ...

Module names are flattened: `_` means `_` or `.`. icm needs separate layer numbers, so here a number between underscores
gets dots around it. Flattening the result restores the name in the file.

Source: kohya-ss/sd-scripts, networks/lora.py.
"""

from __future__ import annotations

import re
from itertools import pairwise

from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.formats.images.single_file_names import Naming, Style

_STEM = re.compile(r"lora_[A-Za-z0-9_]+")
STYLE = Style("{}.lora_down.weight", "{}.lora_up.weight")


def dotted(stem: str) -> str:
    """Put dots around the numbers in a flattened name: `blocks_4_1_norm` becomes `blocks.4.1.norm`."""
    words = stem.split("_")
    ends = ["." if word.isdigit() or after.isdigit() else "_" for word, after in pairwise(words)]
    return "".join(word + end for word, end in zip(words, [*ends, ""], strict=True))


def flattened(module: str) -> str:
    """Return a module's name in the file."""
    return module.replace(".", "_")


_NAMING = Naming(_STEM, (STYLE,), dotted, flattened)
KOHYA = SingleFileFormat("kohya", "one file, as kohya's sd-scripts save LoRA and LoCon", _NAMING, takes_damaged=True)
