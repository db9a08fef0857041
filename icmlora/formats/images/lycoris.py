"""Files of LyCORIS: LoCon can have a code; LoHa, LoKr, OFT, GLoRA and IA3 are kept as they are.

    lycoris_mid_block_attentions_0_proj_in.lora_down.weight    or with the stems of kohya's files

Source: KohakuBlueleaf/LyCORIS, lycoris/modules.
"""

from __future__ import annotations

import re

from icmlora.formats.images.kohya import STYLE, dotted, flattened
from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.formats.images.single_file_names import Naming, other_method

_STEM = re.compile(r"(lycoris|lora)_[A-Za-z0-9_]+")


_NAMING = Naming(
    _STEM,
    (STYLE,),
    dotted,
    flattened,
    is_mark=lambda key: key.startswith("lycoris_") or other_method(key) is not None,
)
LYCORIS = SingleFileFormat("lycoris", "one file, as LyCORIS saves LoCon, LoHa, LoKr and others", _NAMING)
