"""Adapter -> code: find the coarsest quantiser step whose bytes keep a limit, by trying.

    adapter ──tokens──▶ latent, shifts ──▶ integers at one step ──▶ code ──decode──▶ errors ──▶ coarser or finer step

The theory of reverse water-filling says where to begin; every step that is tried is encoded, decoded and measured, so
the limit holds for the bytes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.metrics import relative_dw_error
from icmlora.adapter.model import Adapter
from icmlora.errors import GeneratorError
from icmlora.generator.code import ABSENT, CodeHead
from icmlora.generator.cvae import TaskState
from icmlora.generator.decoder import Decoder
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.objective import water_level, worth_writing
from icmlora.generator.packing import KindIntegers, written_slots
from icmlora.generator.quantizer import Slots
from icmlora.generator.scales import OCTAVE, STRENGTHS
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.tokens import KindTokens, refuse_overflow, slot_overlaps, squared_norm, tokenize, weighted

# Steps tried below and above the one that theory gives for a tolerance, in eighths of an octave.
_BELOW, _ABOVE = 4 * OCTAVE, 2 * OCTAVE
# How often the search goes down by `_BELOW` again: 2^-16 of the expected step is below what float32 resolves.
_RETRIES = 3
_STRONGEST = STRENGTHS  # a code is made at most twice as strong


@dataclass(frozen=True)
class Encoded:
    """A code or a residual, with the errors of the adapter that it decodes to."""

    data: bytes
    dw_error: float  # relative squared error of dW
    # The same of dW weighted by the sensitivity of its channels; equal to `dw_error` under even weights.
    weighted_error: float
    # That adapter, where the caller wants to go on with it.
    decoded: Adapter | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Limits:
    """The largest errors that a code may have; at least one of the two is set."""

    tolerance: float | None = None  # largest weighted error
    max_error: float | None = None  # largest relative dW error

    @property
    def least(self) -> float:
        """The smaller limit."""
        return min(math.inf if limit is None else limit for limit in (self.tolerance, self.max_error))

    def keeps(self, encoded: Encoded) -> bool:
        """Say whether a code is within the limits."""
        pairs = ((encoded.weighted_error, self.tolerance), (encoded.dw_error, self.max_error))
        return all(limit is None or error <= limit for error, limit in pairs)

    def expected_step(self, tokens: Sequence[KindTokens], sensitivity: Sensitivity, subspace: InitialSubspace) -> int:
        """Return the step, in eighths of an octave, that theory gives for the smaller limit."""
        return math.floor(OCTAVE * math.log2(water_level(tokens, self.least, sensitivity, subspace)))


def encode_adapter(
    codec: Decoder,
    adapter: Adapter,
    vectors: Mapping[str, torch.Tensor],
    initial: InitialA | None,
    limits: Limits,
    *,
    keep_decoded: bool,
) -> Encoded:
    """Encode one adapter with the coarsest quantiser step found that keeps the limits; see `Codec.encode`."""
    tokens = tokenize(adapter, codec.config, codec.sensitivity)
    refuse_overflow(tokens, codec.config)
    condition, subspace = codec.condition(vectors), codec.subspace(initial)
    state = TaskState(condition, codec.net.posterior(tokens, condition).round().clamp(-127, 127), subspace)
    state = replace(state, subspace=replace(subspace, shifts=codec.quantizer.shifts(tokens, state)))
    expected = limits.expected_step(tokens, codec.sensitivity, subspace)

    def at(step: int) -> Encoded:
        found = measure(codec, adapter, _encode_at(step, codec, adapter, tokens, state, initial))
        return found if keep_decoded else replace(found, decoded=None)  # one decoded adapter at a time in memory

    return coarsest(expected, limits, at)


def coarsest(expected: int, limits: Limits, encode: Callable[[int], Encoded]) -> Encoded:
    """Return the result of the coarsest step (eighths of an octave) that keeps the limits, by bisection."""
    low, high = expected - _BELOW, expected + _ABOVE
    best = encode(low)
    for _ in range(_RETRIES):
        if limits.keeps(best):
            break
        low, high = low - _BELOW, low - 1
        best = encode(low)
    if not limits.keeps(best):
        raise GeneratorError(f"no code keeps the error at or below {limits.least:g}", hint="allow a larger error")
    while low < high:  # a coarser step loses more, nearly always; `best` keeps the limits in any case
        middle = (low + high + 1) // 2
        tried = encode(middle)
        if limits.keeps(tried):
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def measure(codec: Decoder, adapter: Adapter, code: bytes) -> Encoded:
    """Decode a code and compare the result with the adapter that was encoded."""
    return compare(codec, adapter, codec.decode(code), code)


def compare(codec: Decoder, adapter: Adapter, decoded: Adapter, data: bytes) -> Encoded:
    """Measure how far an adapter, decoded from these bytes, is from the one that was encoded."""
    pair = (weighted(which, codec.config, codec.sensitivity) for which in (adapter, decoded))
    return Encoded(data, relative_dw_error(adapter, decoded), relative_dw_error(*pair), decoded)


def quantised(
    codec: Decoder, group: KindTokens, state: TaskState, step: int, gain: int | None = None
) -> tuple[KindIntegers, KindTokens, KindTokens]:
    """Round the tokens of one kind, and leave out the slots that are not worth their bits."""
    # step and gain are log2 in eighths; norms are counted from the gain, by default the tokens' own mean. Returns the
    # integers of the slots that are kept, the tokens of these slots, and the tokens that the integers decode to.
    slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
    gain, residuals = codec.quantizer.norm_residuals(slots, group.norm, gain)
    norms = codec.quantizer.norms(slots, gain, residuals)
    sides = codec.quantizer.quantise(group, norms, state, step)
    scales = codec.quantizer.scales(slots, norms, state.subspace, step)
    rebuilt = codec.quantizer.dequantise(slots, norms, state, step, sides, scales)
    inputs, outputs, along = (torch.from_numpy(side) for side in sides)
    is_worth = worth_writing(group, rebuilt, (torch.cat([inputs, along], dim=1), outputs))  # (n,)
    keep = written_slots(slots, is_worth.numpy())
    kept = torch.from_numpy(keep)
    return KindIntegers(slots, gain, residuals, *sides, scales)[keep], group[kept], rebuilt[kept]


def strength_of(original: KindTokens, overlaps: torch.Tensor) -> int:
    """Return the strength with which the decoded dW of a kind is as long, along the original, as the original is."""
    # Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more of its
    # gain than the larger error of a full-strength one costs (docs/results/LOG.md). overlaps: inner product of original
    # and decoded dW in each kept slot. Returns log2 of a factor, in 64ths.
    along, length = float(overlaps.sum()), squared_norm([original])
    if not 0 < along < math.inf:  # products of very large values overflow float32
        return 0
    return min(max(round(STRENGTHS * math.log2(length / along)), 0), _STRONGEST)


def _encode_at(
    step: int,
    codec: Decoder,
    adapter: Adapter,
    tokens: Sequence[KindTokens],
    state: TaskState,
    initial: InitialA | None,
) -> bytes:
    shape = len(codec.config.kinds), codec.config.layers  # (K, L)
    gains, strengths = np.zeros(shape[0], dtype=np.int16), np.zeros(shape, dtype=np.int8)
    kept = np.full(shape, ABSENT, dtype=np.uint8)
    for module in adapter.layout:
        kept[codec.config.place_of(module)] = 0
    groups: list[KindIntegers] = []
    for original in tokens:
        group, kept_tokens, rebuilt = quantised(codec, original, state, step)
        groups.append(group)
        kind, layers = group.slots.kind, group.slots.layer
        gains[kind] = group.gain
        strengths[kind, np.unique(layers)] = strength_of(original, slot_overlaps(kept_tokens, rebuilt))
        np.add.at(kept[kind], layers, 1)
    head = CodeHead(
        step=step,
        condition=_bytes(state.condition),
        latent=_bytes(state.latent),
        gains=gains,
        strengths=strengths,
        kept=kept,
        shifts=state.subspace.shifts,
        boosts=state.subspace.boosts,
        initial=initial,
        task_type=adapter.task_type,
    )
    return codec.close(head, groups)


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)
