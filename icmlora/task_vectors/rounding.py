"""Rounding to what every processor agrees on, so that ties are ties and nothing is nothing.

The last bits of a sum depend on the processor, the library and the number of threads. A comparison must not hang on
them: which of two tasks is nearer, whether two are in one place, which way up a picture is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Distances and silhouettes are at most 2 and are told to three digits. Rounding moves them by 1e-15 to 1e-13, so two
# processors that round differently get the same value in all but one of 10,000 cases.
_DECIMALS = 9


def settled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round values of the size of one, whatever their shape; a negative zero becomes zero."""
    rounded: NDArray[np.float64] = np.round(values, _DECIMALS) + 0.0
    return rounded
