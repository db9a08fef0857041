"""Import bitsandbytes, if installed, without its downloads and warnings. Import this before PEFT or diffusers.

Both import bitsandbytes if it is installed. On some processors it then loads machine code from the Hugging Face hub if
the package `kernels` is installed, and warns if it is not. icm uses neither the network nor that code (see
`icmlora.base_models.quantised`).
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec


def _import_quietly() -> None:
    # It also warns in each pass of each int8 layer that inputs are rounded, as int8 requires.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    kernels = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if kernels is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels


if find_spec("bitsandbytes") is not None:
    _import_quietly()
