"""Memory that runs out, on a card or on this machine: recognise it, and free what was in use. Never imports torch."""

from __future__ import annotations

import gc
import re
import sys
import traceback

from icmlora.errors import OutOfMemory

# What torch's allocators say in a plain RuntimeError: those of the CPU, of cuBLAS and of Apple's GPUs.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"tried to allocate (\d[\d.]*) (\w+)", re.IGNORECASE)
_MORE = "free some memory, or use a machine with more"


def ran_out(error: BaseException) -> bool:
    """Return whether an exception means that memory ran out."""
    is_plain = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return is_plain or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def out_of_memory(error: BaseException, helps: str = _MORE) -> OutOfMemory:
    """Free what was in use when memory ran out, and return an error that says so.

    Args:
        error: For which `ran_out` holds. What its functions had in their variables is gone then.
        helps: What would help, as the hint.
    """
    asked = _ASKED.search(str(error))
    where = "the card" if is_on_card(error) else "this machine"
    more = "" if asked is None else f": {asked[1]} {asked[2]} more were requested"
    free(error)
    return OutOfMemory(f"{where} ran out of memory{more}", hint=helps)


def is_on_card(error: BaseException) -> bool:
    """Return whether the memory that ran out is that of a card."""
    return not isinstance(error, MemoryError) and "can't allocate memory" not in str(error)


def free(error: BaseException) -> None:
    """Free what the functions that an exception came through had in use, on a card too."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
