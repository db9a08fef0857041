"""Sketches: 1,024 numbers per adapter that show which adapters may be near each other, without reading them again.

A module's dW is multiplied from both sides by random signs (as in Alon, Matias and Szegedy 1996). They depend only on
its name and widths:

    Y = sum over modules of  S_out D_out dW D_in S_in^T      four times 16 x 16 values, from the factors
    E ||Y||^2 = 1024 ||dW||^2,   and since Y is linear in dW:   E ||Y - Y'||^2 = 1024 ||dW - dW'||^2

So the distance of two sketches estimates the distance of their adapters, for any ranks, factors or types. The worst
case is a difference in one module of rank 1: the square then has a standard deviation of 26 %. By the moments of such
a square, the probability that it is more than four times too large is below 1e-8. Over dozens of modules the deviation
is about 5 %.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from icmlora.adapter.model import Adapter

_REPEATS, _SIDE = 4, 16
SKETCH_SIZE = _REPEATS * _SIDE * _SIDE
"""Values of one sketch."""
_ROWS = _REPEATS * _SIDE
_MARGIN = 2.0  # sketches of a pair within the limit are within twice the limit: missed with probability below 1e-8
_NOISE = 0.01  # differences of float32 sketches below this share of their norm are rounding
_BLOCK = 1024
_ROUNDING = 1e-6

Side = Literal["in", "out"]
Floats = npt.NDArray[np.float32]


def sketch(adapter: Adapter) -> Floats:
    """Return the sketch of an adapter: float32 of shape (1024,), with about the norm of its dW.

    It is the same on every machine, up to rounding. Values beyond float32 become infinite or NaN.
    """
    total = torch.zeros(_REPEATS, _SIDE, _SIDE)
    for module in adapter.modules:
        name, rank, inputs, outputs = module.shape
        a, b = (factor.detach().to("cpu", torch.float32) for factor in (module.a, module.b))
        right = (a * _signs(name, "in", inputs)) @ _rows("in", inputs).mT
        left = _rows("out", outputs) @ (b * _signs(name, "out", outputs)[:, None])
        # (64, r) and (r, 64), each of four independent parts: (4, 16, r) @ (4, r, 16).
        total += left.view(_REPEATS, _SIDE, rank) @ right.view(rank, _REPEATS, _SIDE).transpose(0, 1)
    values: Floats = (total.flatten() / SKETCH_SIZE**0.5).numpy()
    return values


def near_pairs(sketches: Floats, norms: npt.NDArray[np.float64], limit: float) -> list[tuple[int, int]]:
    """Return the pairs of adapters that may be within a distance of each other, probably nearest first.

    A pair within the limit (0 to below 1) is missed with probability below 1e-8. The result includes pairs at up to
    twice the limit, so compute the distance of each (`icmlora.adapter.metrics.distance`). Sketches are (n, 1024); norms
    ||dW|| are (n,) and positive.
    """
    order = np.argsort(norms, kind="stable")
    sketches, norms, count = sketches[order], norms[order], len(norms)
    cut = max(_MARGIN * limit, _NOISE) ** 2
    # ||dW - dW'|| is at least the difference of the norms: compare only adapters of similar norm.
    reach = np.searchsorted(norms, norms / (1 - limit) * (1 + _ROUNDING), side="right")
    # Unit length: the squares of very large and very small values are beyond float32.
    units = sketches / norms[:, None].astype(np.float32)
    squares = np.einsum("ij,ij->i", units, units, dtype=np.float64)
    found = []
    for start in range(0, count, _BLOCK):  # by blocks of a matrix product
        rows = slice(start, min(start + _BLOCK, count))
        for other in range(start, int(reach[rows.stop - 1]), _BLOCK):
            columns = slice(other, min(other + _BLOCK, count))
            share = norms[rows, None] / norms[columns]
            products = units[rows] @ units[columns].T
            estimates = squares[rows, None] * share**2 + squares[columns] - 2.0 * share * products
            left, right = np.nonzero(estimates <= cut)
            ahead = left + start < right + other  # each pair once; the column has the larger norm
            left, right = left[ahead], right[ahead]
            found.append((estimates[left, right], left + start, right + other))
    if not found:
        return []
    estimates, left, right = (np.concatenate(parts) for parts in zip(*found, strict=True))
    first, second = np.sort([order[left], order[right]], axis=0)
    # Round the estimates to get the same order on every processor.
    nearest = np.lexsort((second, first, np.round(estimates / _NOISE**2)))
    return list(zip(first[nearest].tolist(), second[nearest].tolist(), strict=True))


@lru_cache(maxsize=32)  # a model has few widths
def _rows(side: Side, width: int) -> torch.Tensor:
    """Return the random signs that all modules of a width share: float32 of shape (64, width)."""
    return _drawn(f"{side} {width}", _ROWS * width).view(_ROWS, width).float()


@lru_cache(maxsize=4096)  # the adapters of a fleet have modules of the same names
def _signs(name: str, side: Side, width: int) -> torch.Tensor:
    """Return the random signs that make a module's part independent of the others: int8 of shape (width,)."""
    return _drawn(f"{side} {width} {name}", width)


def _drawn(seed: str, count: int) -> torch.Tensor:
    bits = hashlib.shake_128(f"icm sketch {seed}".encode()).digest((count + 7) // 8)
    drawn = np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.int8)
    return torch.from_numpy(np.int8(1) - np.int8(2) * drawn)
