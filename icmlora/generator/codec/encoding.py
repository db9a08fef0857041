"""Adapter -> code: find the coarsest quantiser step that keeps a limit, or the finest whose code is small enough.

    adapter ──tokens──▶ latent, shifts ──▶ integers at one step ──▶ code ──decode──▶ errors ──▶ coarser or finer step

Reverse water-filling predicts the first step; for a large adapter, a part of its layers corrects the prediction. Each
step tried is rounded, decoded as its code would be, and measured. The result is written, decoded from its bytes and
measured again, so the limit holds for the bytes themselves.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch

from icmlora.adapter.metrics import error_and_norm, relative
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import GeneratorError
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.limits import Limits, Measured
from icmlora.generator.codec.steps import AdapterSteps, Rounded
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.network.tokens import Modules
from icmlora.generator.scales import OCTAVE

# Range of steps below and above the expected one, in eighths of an octave: 2^-16 of it is below float32's resolution.
_BELOW, _ABOVE = 16 * OCTAVE, 2 * OCTAVE
_SURE = 1.03  # for small adapters: theory predicts the growth of the error per step to about a hundredth
_FINEST, _COARSEST = 1e-8, 0.95  # squared errors that bound the steps tried for a size
_USUAL = 2.0  # usual offset of the step above theory, in eighths of an octave: 1 to 3 for real adapters
_TRIES = 4  # maximum number of tries for the first step; one or two are usual
_SMALL_ERROR = 1e-3  # float32 rounding would show in smaller squared errors
_ALIKE = 1e-3  # relative difference of one code's errors: float32 rounds in another order during the search

_Errors = tuple[tuple[float, float], tuple[float, float]]  # squared error and norm of plain dW, and of weighted dW
_Tried = TypeVar("_Tried", bound=Measured)


@dataclass(frozen=True)
class Encoded:
    """A code, with the errors of the adapter that it decodes to."""

    data: bytes
    squared_error: float  # of dW
    # The same for dW weighted by the sensitivity of its channels; equal to `squared_error` under even weights.
    weighted_error: float


@torch.no_grad()
def encode_adapter(
    codec: Codec,
    adapter: Adapter,
    vectors: Mapping[str, torch.Tensor],
    initial: InitialA | None = None,
    limits: Limits | None = None,
) -> Encoded:
    """Encode one adapter with the coarsest quantiser step found that keeps the limits of its errors.

    Args:
        codec: The codec of the generator.
        adapter: The adapter, as its trainer wrote it.
        vectors: Its task vectors by view, each of shape (size,).
        initial: Where its initial A was drawn, if that is known.
        limits: By default the generator's own tolerance. With a size, the code is the most accurate one within
            it, or the smallest found if none fits.

    Raises:
        NotCovered: The generator has no place for one of the modules or ranks.
        GeneratorError: No code keeps the limits.
    """
    limits = limits or Limits(tolerance=codec.config.tolerance)
    asked = limits
    while True:
        # Steps take as much memory as the adapter, as do integers; both are freed before the code is decoded.
        if limits.size is not None:
            data, error = _finest(AdapterSteps(codec, adapter, vectors, initial), limits.size)
        else:
            is_plain_wanted = asked.max_error is not None and not codec.sensitivity.is_even
            is_exact = asked.least < _SMALL_ERROR
            steps = AdapterSteps(codec, adapter, vectors, initial, is_plain_wanted=is_plain_wanted, is_exact=is_exact)
            best = _coarsest_of(steps, asked)
            data, error = codec.close(best.head, best.groups), best.weighted_error
            del steps, best
        encoded = measured(codec, adapter, data)
        if not math.isclose(encoded.weighted_error, error, rel_tol=_ALIKE, abs_tol=_ALIKE**2):
            raise GeneratorError("the code does not decode to the encoded values")
        if limits.size is not None or limits.keeps(encoded):
            return encoded
        asked = asked.tighter()  # it was at the limit, and float32 rounding put it beyond


def _finest(steps: AdapterSteps, size: int) -> tuple[bytes, float]:
    """Return the code of the finest step found that takes at most `size` bytes, and its weighted error."""
    low, high = map(steps.expected, (_FINEST, _COARSEST))
    high += _ABOVE
    best: tuple[bytes, float] | None = None
    while low <= high:
        step = (low + high) // 2
        data, error = steps.code(step)
        if len(data) <= size:
            high = step - 1
            # A finer step nearly always loses less.
            if best is None or len(best[0]) > size or error <= best[1]:
                best = data, error
        else:
            low = step + 1
            if best is None or size < len(data) < len(best[0]):
                best = data, error
    assert best is not None
    return best


def _coarsest_of(steps: AdapterSteps, limits: Limits) -> Rounded:
    """Round an adapter at the coarsest step found that keeps the limits."""
    at: Callable[[int], Rounded] = steps.at
    enough = limits.enough(steps.theory)
    if steps.is_small:
        at, enough = cache(at), _SURE * enough
        offset = _offset(limits, steps, at)
    else:
        sample = steps.sample()  # theory is about as far off for the whole as for a part
        offset = _offset(limits, sample, sample.at)
        del sample
    return coarsest(math.floor(limits.expected_step(steps.theory) + offset), limits, at, min(enough, 1.0))


def _offset(limits: Limits, steps: AdapterSteps, at: Callable[[int], Rounded]) -> float:
    """Return how far the step that just keeps the limits is above theory, in eighths of an octave."""
    expected, offset = limits.expected_step(steps.theory), _USUAL
    for _ in range(_TRIES):
        tried = math.floor(expected + offset)
        # Theory predicts the remaining distance from the step tried.
        found = tried - limits.expected_step(steps.theory, used=limits.used(at(tried)))
        offset = min(max(found, -_BELOW), _ABOVE)
        if abs(expected + offset - tried) < 2:
            break
    return offset


def coarsest(expected: int, limits: Limits, encode: Callable[[int], _Tried], enough: float = 1.0) -> _Tried:
    """Return the result of the coarsest step (eighths of an octave) that keeps the limits, or of a step near it.

    From the expected step the strides double until the limits start or stop being kept; bisection follows.

    Raises:
        GeneratorError: No step keeps the limits.
    """
    # A coarser step nearly always loses more; the result keeps the limits in any case. A step that uses the share
    # `enough` of the limits is coarse enough: each try takes half a second for a large adapter.
    lowest, highest = expected - _BELOW, expected + _ABOVE
    low, best = expected, encode(expected)
    high, stride = highest + 1, 1  # high: breaks the limits, or is out of range
    while not limits.keeps(best):
        low, high, stride = low - stride, low, 2 * stride
        if low < lowest:
            fact = f"no code has a relative error of {math.sqrt(limits.least):g} or less"
            raise GeneratorError(fact, hint="allow a larger error")
        best = encode(low)
    while high - low > 1 and limits.used(best) < enough:
        # No step is known yet that breaks the limits: try coarser ones.
        middle, stride = (min(low + stride, highest), 2 * stride) if high > highest else ((low + high) // 2, stride)
        tried = encode(middle)
        if limits.keeps(tried):
            low, best = middle, tried
        else:
            high = middle
    return best


@torch.no_grad()
def measured(codec: Codec, adapter: Adapter, data: bytes) -> Encoded:
    """Decode a code and measure its errors against the original, with one kind in memory at a time."""
    originals = {module.name: module for module in adapter.modules}

    def lost(modules: Modules) -> dict[str, _Errors]:
        pairs = ((originals.get(module.name), module) for module in modules.values())
        return {other.name: _lost(codec, one, other) for one, other in pairs if one is not None}

    _, parts = codec.each_kind(data, lost)
    found = dict(ChainMap(*parts))
    losses = [found.get(name) or _lost(codec, module, None) for name, module in originals.items()]
    plain, heavy = zip(*losses, strict=True)
    return Encoded(data, relative(plain), relative(heavy))


def _lost(codec: Codec, original: LoraModule, decoded: LoraModule | None) -> _Errors:
    """Return a module's squared errors and norms; `decoded` is None if the code lacks it."""
    plain = error_and_norm(original, decoded)
    if codec.sensitivity.is_even:
        return plain, plain
    place = codec.config.place_of(original.shape)
    sides = (None if one is None else codec.sensitivity.weigh(one, *place) for one in (original, decoded))
    return plain, error_and_norm(*sides)
