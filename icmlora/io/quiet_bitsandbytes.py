"""Import bitsandbytes, if it is installed, without what it does and says then. Import this before PEFT or diffusers.

Both import bitsandbytes wherever they find it. On some processors it then loads machine code from the Hugging Face hub,
if the package `kernels` is there, and warns if it is not. icm asks no network, and does not use that code (see
`icmlora.base_models.quantised`).
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec


def _import_quietly() -> None:
    # It also warns in each pass of each int8 layer that inputs are rounded, which is what int8 means.
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
