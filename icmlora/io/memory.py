"""Recognise out-of-memory errors of a GPU or the host, and free memory. Never imports torch."""

from __future__ import annotations

import gc
import re
import sys
import traceback

from icmlora.errors import OutOfMemory

# Messages of torch's allocators (CPU, cuBLAS, Apple GPUs) in a plain RuntimeError.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ASKED = re.compile(r"tried to allocate (\d[\d.]*) (\w+)", re.IGNORECASE)
_MORE = "free some memory, or use a machine with more"


def ran_out(error: BaseException) -> bool:
    """Return whether an exception is an out-of-memory error."""
    is_plain = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    return is_plain or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def out_of_memory(error: BaseException, helps: str = _MORE) -> OutOfMemory:
    """Free the memory held by a failed call, and return the error to raise.

    Args:
        error: An error for which `ran_out` is true. The local variables of its frames are cleared.
        helps: The hint.
    """
    asked = _ASKED.search(str(error))
    where = "the card" if is_on_card(error) else "this machine"
    more = "" if asked is None else f": {asked[1]} {asked[2]} more were requested"
    free(error)
    return OutOfMemory(f"{where} ran out of memory{more}", hint=helps)


def is_on_card(error: BaseException) -> bool:
    """Return whether a GPU, not the host, ran out of memory."""
    return not isinstance(error, MemoryError) and "can't allocate memory" not in str(error)


def free(error: BaseException) -> None:
    """Free memory held by the frames of an exception, including GPU memory."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
