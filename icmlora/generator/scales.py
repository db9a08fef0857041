"""Integer scales and the frequency tables of the entropy coder.

Every scale is a whole number of eighths of an octave, so encoder and decoder agree on it exactly. The tables come from
one float64 computation. Their digest is stored in the generator and compared when it is opened, so a machine with
different arithmetic refuses to decode instead of writing wrong weights.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

OCTAVE = 8  # steps per factor of two for norms, quantiser steps and scales
STRENGTHS = 64  # steps per factor of two for the factors that decoded values are multiplied by
SMALLEST, LARGEST = -4 * OCTAVE, 8 * OCTAVE  # range of a scale index: 2^-4 to 2^8 quantiser steps
SMALLEST_SCALE = 2.0 ** (SMALLEST / OCTAVE)
# A coefficient is modelled as Gaussian, one in twenty as a Gaussian twice as wide to make outliers cheap.
GAUSSIAN_SHARE, WIDE = 0.95, 2.0
EXTREME = 120 * OCTAVE  # norms and quantiser steps lie between 2^-120 and 2^120, within float32
# Approximate sum of a table's frequencies; every symbol gets at least 1, so everything can be coded.
_PRECISION = 1 << 20
_REACH = 3  # integers up to about 3 scales are symbols; few are larger, and small tables are faster to read
_FAR = 16  # means of bins are listed up to about 16 scales
RARITIES = 256  # number of rarities, which are shares of nonzeros: 1, 2^(-1/8), ... 2^(-255/8)
_ONE = 1 << 32
_GAPS = 64  # maximum symbols in a table of gaps


@cache
def frequencies(index: int) -> NDArray[np.int64]:
    """Return integer frequencies of the symbols -reach .. reach of one scale index, shape (2 * reach + 1,)."""
    scale = 2.0 ** (index / OCTAVE)
    reach = reach_of(index)
    edges = np.arange(-reach, reach + 2) - 0.5  # of the bins around -reach .. reach, in quantiser steps
    edges[[0, -1]] = -np.inf, np.inf  # the outermost bins hold everything beyond
    near, far = _cumulative(edges / scale), _cumulative(edges / (WIDE * scale))
    mass = np.diff(GAUSSIAN_SHARE * near + (1 - GAUSSIAN_SHARE) * far)
    table: NDArray[np.int64] = np.maximum(np.rint(mass * _PRECISION), 1).astype(np.int64)
    return table


def reach_of(index: int) -> int:
    """Return the largest magnitude in the table of one scale index; it also announces anything larger."""
    return 1 + math.ceil(_REACH * math.exp2(index / OCTAVE))


@cache
def probabilities(index: int) -> NDArray[np.float64]:
    """Return the frequencies divided by their sum, for the entropy coder (which makes them integers again)."""
    table: NDArray[np.float64] = frequencies(index) / frequencies(index).sum()
    return table


@cache
def nonzero_probabilities(index: int) -> NDArray[np.float64]:
    """Return the probabilities of -reach .. -1, 1 .. reach among nonzero integers of one scale."""
    table, reach = frequencies(index), reach_of(index)
    others = np.delete(table, reach)
    chances: NDArray[np.float64] = others / others.sum()
    return chances


@cache
def nonzero_share(index: int) -> float:
    """Return the probability that an integer of one scale is nonzero."""
    table, reach = frequencies(index), reach_of(index)
    return float(1 - table[reach] / table.sum())


@cache
def usual_rarity(index: int) -> int:
    """Return the expected rarity of nonzero integers of one scale."""
    return min(round(-OCTAVE * math.log2(nonzero_share(index))), RARITIES - 1)


@cache
def rarity_bounds() -> NDArray[np.int64]:
    """Return the shares below which each rarity ends, in units of 2^-32, shape (256,); the last one ends at 0."""
    shares = np.exp2(-(np.arange(RARITIES) + 0.5) / OCTAVE)
    bounds: NDArray[np.int64] = np.rint(_ONE * shares).astype(np.int64)
    bounds[-1] = 0
    return bounds


@cache
def gap_frequencies(rarity: int) -> tuple[int, NDArray[np.int64]]:
    """Return the shift of gaps between nonzeros, in bits, and the frequencies of the shifted gaps.

    The last symbol announces a gap as long or longer. The bits shifted out are roughly uniform.
    """
    share = min(2.0 ** (-rarity / OCTAVE), 0.999)
    shift = max(0, math.floor(-3 - math.log2(share)))  # a block of 2^shift holds a nonzero once in 8 times, or less
    ratio = (1 - share) ** (1 << shift)
    count = min(_GAPS, 2 + math.ceil(math.log(1e-4) / math.log(ratio)))
    mass = (1 - ratio) * ratio ** np.arange(count)
    mass[-1] /= 1 - ratio
    return shift, np.maximum(np.rint(mass * _PRECISION), 1).astype(np.int64)


@cache
def centres(index: int) -> NDArray[np.float64]:
    """Return the decoded magnitudes 0, 1, ..., shape (M,): the means of a Gaussian inside their quantiser bins.

    Magnitude m covers the values from m - 1/2 to m + 1/2, in quantiser steps. The last one is above 16 scales.
    """
    scale = 2.0 ** (index / OCTAVE)
    low = np.arange(1, 3 + math.ceil(_FAR * scale)) - 0.5
    high = low + 1
    mass = _cumulative(-low / scale) - _cumulative(-high / scale)
    density = (np.exp(-0.5 * (low / scale) ** 2) - np.exp(-0.5 * (high / scale) ** 2)) * scale / math.sqrt(2 * math.pi)
    # Far in the tail both vanish; there the bin's middle is as good as its mean.
    mean = np.where(mass > 1e-12, density / np.maximum(mass, 1e-12), (low + high) / 2)
    return np.concatenate([[0.0], np.clip(mean, low, high)])


@cache
def centre_table() -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return the centres of all scale indices in a row (n,), and where each index begins, from `SMALLEST`."""
    tables = [centres(index).astype(np.float32) for index in range(SMALLEST, LARGEST + 1)]
    starts = np.cumsum([0, *(len(table) for table in tables)])
    return np.concatenate(tables), starts.astype(np.int32)


@cache
def tables_digest() -> str:
    """Return the SHA-256 of all tables needed to read integers."""
    digest = hashlib.sha256()
    for index in range(SMALLEST, LARGEST + 1):
        digest.update(frequencies(index).astype("<i8").tobytes() + bytes([usual_rarity(index)]))
    digest.update(rarity_bounds().astype("<i8").tobytes())
    for rarity in range(RARITIES):
        shift, table = gap_frequencies(rarity)
        digest.update(bytes([shift]) + table.astype("<i8").tobytes())
    return digest.hexdigest()


def _cumulative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard normal distribution function, from the C library's erfc."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values.tolist()])
