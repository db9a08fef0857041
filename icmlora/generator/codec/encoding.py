"""Adapter -> code: find the coarsest quantiser step that keeps a limit, or the finest whose code is small enough.

    adapter ──tokens──▶ latent, shifts ──▶ integers at one step ──▶ code ──decode──▶ errors ──▶ coarser or finer step

Reverse water-filling predicts the first step; for a large adapter, a part of its layers corrects the prediction. Each
step tried is rounded, decoded as its code would be, and measured. The result is written, decoded from its bytes and
measured again, so the limit holds for the bytes themselves.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.metrics import error_and_norm, relative
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import GeneratorError
from icmlora.generator.codec.code import CodeHead
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.limits import Limits, Measured
from icmlora.generator.codec.rounding import Rounded, Rounding
from icmlora.generator.files.container import ABSENT
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.network.cvae import TaskState
from icmlora.generator.network.stack import stacked
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import KindTokens, Modules, refuse_overflow, refuse_underflow
from icmlora.generator.network.water_filling import WaterFilling
from icmlora.generator.scales import OCTAVE
from icmlora.io.threads import one_thread

# Range of steps below and above the expected one, in eighths of an octave: 2^-16 of it is below float32's resolution.
_BELOW, _ABOVE = 16 * OCTAVE, 2 * OCTAVE
_SMALL = 1 << 22  # parameters; up to here the search keeps the predictions of all kinds in memory
_SURE = 1.03  # for small adapters: theory predicts the growth of the error per step to about a hundredth
_FINEST, _COARSEST = 1e-8, 0.95  # squared errors that bound the steps tried for a size
_PART = 8  # every eighth module of a larger adapter is enough to estimate the coarsest step
_USUAL = 2.0  # usual offset of the step above theory, in eighths of an octave: 1 to 3 for real adapters
_TRIES = 4  # maximum number of tries for the first step; one or two are usual
_FAINT = 0.25  # a slot is faint if its values have a smaller root mean square, in steps (docs/results/LOG.md)
_SMALL_ERROR = 1e-3  # float32 rounding would show in smaller squared errors
_ALIKE = 1e-3  # relative difference of one code's errors: float32 rounds in another order during the search


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
        limits: By default the generator's own tolerance. Under a size, the code is the most accurate of at most so
            many bytes, or the smallest found if none has so few.

    Raises:
        NotCovered: The generator has no place for one of the modules or ranks.
        GeneratorError: No code keeps the limits.
    """
    if limits is None:
        limits = Limits(tolerance=codec.config.tolerance)
    if limits.size is not None:
        return _encode_within(codec, adapter, vectors, initial, limits.size)
    asked = limits
    while True:
        best = _search(codec, adapter, vectors, initial, asked)
        data, error = codec.close(best.head, best.groups), best.weighted_error
        del best  # its integers take as much memory as the adapter
        encoded = _checked(codec, adapter, data, error)
        if limits.keeps(encoded):
            return encoded
        asked = asked.tighter()  # it was at the limit, and float32 rounding put it beyond


def _search(
    codec: Codec, adapter: Adapter, vectors: Mapping[str, torch.Tensor], initial: InitialA | None, limits: Limits
) -> Rounded:
    """Round an adapter at the coarsest step found that keeps the limits."""
    # The tokens take as much memory as the adapter; returning frees them.
    tokens, state, head = _prepared(codec, adapter, vectors, initial)
    is_large = sum(shape.parameters for shape in adapter.layout) > _SMALL
    is_plain_wanted = limits.max_error is not None and not codec.sensitivity.is_even
    is_exact = limits.least < _SMALL_ERROR
    rounding = partial(Rounding, codec, state=state, head=head, is_plain_wanted=is_plain_wanted, is_exact=is_exact)
    theory = partial(WaterFilling, sensitivity=codec.sensitivity, subspace=state.subspace)
    of_whole = theory(tokens)
    if is_large:
        # Theory is about as far off for the whole as for a part.
        at, part = rounding(tokens, keeps_means=False).at, _part_of(tokens)
        offset = _offset(limits, theory(part), rounding(part, keeps_means=True).at)
        del part
    else:
        at = cache(rounding(tokens, keeps_means=True).at)
        offset = _offset(limits, of_whole, at)
    expected = limits.expected_step(of_whole) + offset
    enough = limits.enough(of_whole) * (1.0 if is_large else _SURE)
    return coarsest(math.floor(expected), limits, at, min(enough, 1.0))


@dataclass(frozen=True)
class SlotChoice:
    """Which slots a code has, and how its strengths compensate for rounding."""

    # Slots whose values are small compared with the step, so most of their integers are 0. They bring |dW| nearer to
    # the original, but improve the adapter's function only a little.
    has_faint: bool
    for_strong: bool  # as `strength_of` has it


class Steps:
    """The codes of one adapter at any quantiser step, log2 in eighths; vectors (size,)."""

    @torch.no_grad()
    def __init__(
        self, codec: Codec, adapter: Adapter, vectors: Mapping[str, torch.Tensor], initial: InitialA | None
    ) -> None:
        self._tokens, state, head = _prepared(codec, adapter, vectors, initial)
        is_small = sum(shape.parameters for shape in adapter.layout) <= _SMALL
        self._codec = codec
        self._rounding = partial(Rounding, codec, state=state, head=head, is_plain_wanted=False, is_exact=False)
        self._at = self._rounding(self._tokens, keeps_means=is_small).at
        self._theory = WaterFilling(self._tokens, codec.sensitivity, state.subspace)

    def expected(self, tolerance: float) -> int:
        """Return the step at which theory expects a weighted squared error."""
        return math.floor(Limits(tolerance=tolerance).expected_step(self._theory))

    @torch.no_grad()
    def code(self, step: int) -> tuple[bytes, float]:
        """Return the code at a step, and its weighted squared error."""
        found = self._at(step)
        return self._codec.close(found.head, found.groups), found.weighted_error

    @torch.no_grad()
    def with_slots(self, step: int, slots: SlotChoice) -> bytes:
        """Return the code at a step with the chosen slots."""
        groups = self._tokens
        if not slots.has_faint:
            least = _FAINT * 2.0 ** (step / OCTAVE)
            stronger = (group[group.root_mean_square() >= least] for group in groups)
            groups = [group for group in stronger if len(group.norm)]
        found = self._rounding(groups, keeps_means=False, for_strong=slots.for_strong).at(step)
        return self._codec.close(found.head, found.groups)


def _encode_within(
    codec: Codec,
    adapter: Adapter,
    vectors: Mapping[str, torch.Tensor],
    initial: InitialA | None,
    size: int,
) -> Encoded:
    """Encode one adapter in at most `size` bytes, with the finest step found."""
    steps = Steps(codec, adapter, vectors, initial)
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
    return _checked(codec, adapter, *best)


def _prepared(
    codec: Codec, adapter: Adapter, vectors: Mapping[str, torch.Tensor], initial: InitialA | None
) -> tuple[Sequence[KindTokens], TaskState, CodeHead]:
    """Return an adapter's tokens, and the parts of its code that do not depend on the step."""
    config = codec.config
    tokens = tokenize(adapter, config, codec.sensitivity)
    refuse_overflow(tokens, config)
    refuse_underflow(tokens)
    state = _state_of(codec, tokens, vectors, initial)
    shape = len(config.kinds), config.layers  # (K, L)
    head = CodeHead(
        step=0,
        condition=_bytes(state.condition),
        latent=_bytes(state.latent),
        gains=np.zeros(shape[0], dtype=np.int16),
        strengths=np.zeros(shape, dtype=np.int8),
        kept=np.full(shape, ABSENT, dtype=np.uint16),
        shifts=state.subspace.shifts,
        boosts=state.subspace.boosts,
        initial=initial,
        task_type=adapter.task_type,
    )
    for module in adapter.layout:
        head.kept[config.place_of(module)] = 0
    return tokens, state, head


@one_thread()
def _state_of(
    codec: Codec, tokens: Sequence[KindTokens], vectors: Mapping[str, torch.Tensor], initial: InitialA | None
) -> TaskState:
    """Return the decoder's state for a task before it reads integers."""
    condition, subspace = codec.condition(vectors), codec.subspace(initial)
    (latent,) = codec.net.posterior(stacked([tokens], by_kind=True), condition[None])
    state = TaskState(condition, latent.round().clamp(-127, 127), subspace)
    return replace(state, subspace=replace(subspace, shifts=codec.quantizer.shifts(tokens, state)))


def _checked(codec: Codec, adapter: Adapter, data: bytes, expected: float) -> Encoded:
    """Decode a code and measure it; raise `GeneratorError` if the weighted error is not the expected one."""
    found = measured(codec, adapter, data)
    if not math.isclose(found.weighted_error, expected, rel_tol=_ALIKE, abs_tol=_ALIKE**2):
        raise GeneratorError("the code does not decode to the encoded values")
    return found


def _offset(limits: Limits, theory: WaterFilling, at: Callable[[int], Rounded]) -> float:
    """Return how far the step that just keeps the limits is above theory, in eighths of an octave."""
    expected, offset = limits.expected_step(theory), _USUAL
    for _ in range(_TRIES):
        tried = math.floor(expected + offset)
        # Theory predicts the remaining distance from the step tried.
        found = tried - limits.expected_step(theory, used=limits.used(at(tried)))
        offset = min(max(found, -_BELOW), _ABOVE)
        if abs(expected + offset - tried) < 2:
            break
    return offset


def _part_of(tokens: Sequence[KindTokens]) -> Sequence[KindTokens]:
    """Return the tokens of every eighth module, kind by kind."""
    layers = [torch.unique_consecutive(group.layer) for group in tokens]
    chosen = torch.arange(sum(map(len, layers))) % _PART == _PART // 2
    parts = []
    for group, found, is_chosen in zip(tokens, layers, torch.split(chosen, list(map(len, layers))), strict=True):
        if is_chosen.any():
            parts.append(group[torch.isin(group.layer, found[is_chosen])])
    return parts or tokens


_Tried = TypeVar("_Tried", bound=Measured)


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

    def lost(modules: Modules) -> dict[str, _Lost]:
        pairs = ((originals.get(module.name), module) for module in modules.values())
        return {other.name: _lost(codec, one, other) for one, other in pairs if one is not None}

    _, parts = codec.each_kind(data, lost)
    found = dict(ChainMap(*parts))
    losses = [found.get(name) or _lost(codec, module, None) for name, module in originals.items()]
    plain, heavy = zip(*losses, strict=True)
    return Encoded(data, relative(plain), relative(heavy))


_Lost = tuple[tuple[float, float], tuple[float, float]]  # squared error and norm of plain dW, and of weighted dW


def _lost(codec: Codec, original: LoraModule, decoded: LoraModule | None) -> _Lost:
    """Return a module's squared errors and norms; `decoded` is None if the code lacks it."""
    plain = error_and_norm(original, decoded)
    if codec.sensitivity.is_even:
        return plain, plain
    place = codec.config.place_of(original.shape)
    weigh = partial(codec.sensitivity.weigh, kind=place[0], layer=place[1])
    return plain, error_and_norm(weigh(original), None if decoded is None else weigh(decoded))


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)
