"""Files of kohya's sd-scripts, and of the many programs that save the same: LoRA and LoCon.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    also lora_te_, lora_te1_, lora_te2_ ...

The names of modules are flattened: `_` stands for `_` or for `.`. Layers need numbers of their own, so here a number
between underscores has dots around it. Flattening that gives the name in the file again.

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
    """Return the name that a file has for a module."""
    return module.replace(".", "_")


_NAMING = Naming(_STEM, (STYLE,), dotted, flattened)
KOHYA = SingleFileFormat("kohya", "one file, as kohya's sd-scripts save LoRA and LoCon", _NAMING, takes_damaged=True)
