"""Adapter -> code: find the coarsest quantiser step that keeps a limit, or the finest whose code is small enough.

    adapter ──tokens──▶ latent, shifts ──▶ integers at one step ──▶ code ──decode──▶ errors ──▶ coarser or finer step

The theory of reverse water-filling says where to begin; of a large adapter, so does a part of its layers. Every step
that is tried is rounded, decoded as its code would be, and measured. What is found is written, decoded from its bytes
and measured again, so the limit holds for the bytes themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.metrics import errors_and_norms, relative
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import GeneratorError
from icmlora.generator.code import CodeHead
from icmlora.generator.codec import Codec, strengthened
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.container import ABSENT
from icmlora.generator.cvae import TaskState
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.limits import Limits, Measured
from icmlora.generator.objective import worth_writing
from icmlora.generator.packing import KindIntegers, written_slots
from icmlora.generator.quantizer import Means, Slots, nonzeros_of, norm_of
from icmlora.generator.scales import OCTAVE, STRENGTHS
from icmlora.generator.stack import stacked
from icmlora.generator.tokens import (
    KindTokens,
    refuse_overflow,
    refuse_underflow,
    slot_overlaps,
    squared_norm,
    tokenize,
    weighted,
)
from icmlora.io.threads import side_by_side

_Parts = list[tuple[float, float]]  # squared error and squared norm of each module
# Steps tried below and above the expected one, in eighths of an octave: 2^-16 of it is below what float32 resolves.
_BELOW, _ABOVE = 16 * OCTAVE, 2 * OCTAVE
_SMALL = 1 << 22  # parameters up to which the predictions of all kinds stay in memory during the search
_WORTH_A_THREAD = 1 << 16  # inputs of a kind on average: of fewer, threads wait for each other longer than they work
_ENOUGH = 0.9  # share of a limit at which the code of a larger adapter is coarse enough: each try takes a second
_FINEST, _COARSEST = 1e-8, 0.95  # squared errors between which the steps for a size are tried
_PART = 8  # of a larger adapter, every eighth layer tells about which step is the coarsest
_STRONGEST = STRENGTHS  # a code is made at most twice as strong
_ALIKE = 1e-3  # errors of the same code, as a share: float32 rounds in another order where integers are tried


@dataclass(frozen=True)
class Encoded:
    """A code or a residual, with the errors of the adapter that it decodes to."""

    data: bytes
    squared_error: float  # of dW
    # The same of dW weighted by the sensitivity of its channels; equal to `squared_error` under even weights.
    weighted_error: float
    # That adapter; None where it was let go.
    decoded: Adapter | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class _Rounded:
    """The integers of an adapter at one step, and the errors of what they decode to."""

    head: CodeHead
    groups: Sequence[KindIntegers]
    squared_error: float
    weighted_error: float


@dataclass(frozen=True)
class _Original:
    """The adapter that is encoded, or a part of it: as it is, and weighted."""

    adapter: Adapter
    weighted: Adapter

    @classmethod
    def of(cls, codec: Codec, adapter: Adapter) -> _Original:
        return cls(adapter, weighted(adapter, codec.config, codec.sensitivity))

    def by_kind(self, config: GeneratorConfig) -> dict[int, _Original]:
        """Split it into its kinds of modules."""
        pairs = defaultdict[int, list[tuple[LoraModule, LoraModule]]](list)
        for pair in zip(self.adapter.modules, self.weighted.modules, strict=True):
            pairs[config.place_of(pair[0].shape)[0]].append(pair)
        split = {kind: tuple(zip(*found, strict=True)) for kind, found in pairs.items()}
        return {
            kind: _Original(replace(self.adapter, modules=plain), replace(self.weighted, modules=heavy))
            for kind, (plain, heavy) in split.items()
        }

    def parts(self, codec: Codec, decoded: Adapter) -> tuple[_Parts, _Parts]:
        """Return squared error and squared norm of each module's dW, and both of weighted dW."""
        plain = errors_and_norms(self.adapter, decoded)
        if codec.sensitivity.is_even:
            return plain, plain
        return plain, errors_and_norms(self.weighted, weighted(decoded, codec.config, codec.sensitivity))


def encode_adapter(
    codec: Codec,
    adapter: Adapter,
    vectors: Mapping[str, torch.Tensor],
    initial: InitialA | None,
    limits: Limits,
) -> Encoded:
    """Encode one adapter with the coarsest step found that keeps the limits; vectors (size,); see `Codec.encode`."""
    tokens, state = _prepared(codec, adapter, vectors, initial)
    subspace = codec.subspace(initial)
    expected = limits.expected_step(tokens, codec.sensitivity, subspace)

    def trials(
        adapter: Adapter, tokens: Sequence[KindTokens], means: dict[int, Means] | None
    ) -> Callable[[int], _Rounded]:
        originals = _Original.of(codec, adapter).by_kind(codec.config)
        return lambda step: _rounded_at(step, codec, adapter, originals, tokens, state, initial, means)

    if sum(shape.parameters for shape in adapter.layout) > _SMALL:
        # How far theory is off in a part is how far it is off in the whole, about.
        some, of_some = _part_of(adapter, tokens, codec.config)
        there = limits.expected_step(of_some, codec.sensitivity, subspace)
        expected += coarsest(there, limits, trials(some, of_some, {})).head.step - there
        at, enough = trials(adapter, tokens, None), _ENOUGH
    else:
        at, enough = trials(adapter, tokens, {}), 1.0
    best = coarsest(expected, limits, at, enough)
    while not limits.keeps(found := _measured(codec, adapter, codec.close(best.head, best.groups), best)):
        best = at(best.head.step - 1)  # it was at the limit, and rounding of float32 put it beyond
    return found


def encode_within(
    codec: Codec,
    adapter: Adapter,
    vectors: Mapping[str, torch.Tensor],
    initial: InitialA | None,
    size: int,
) -> Encoded:
    """Encode one adapter in at most `size` bytes, with the finest step found; vectors (size,); see `Codec.encode`."""
    tokens, state = _prepared(codec, adapter, vectors, initial)
    originals, means = _Original.of(codec, adapter).by_kind(codec.config), None
    if sum(shape.parameters for shape in adapter.layout) <= _SMALL:
        means = dict[int, Means]()
    subspace = codec.subspace(initial)
    low, high = (
        Limits(tolerance=squared).expected_step(tokens, codec.sensitivity, subspace) for squared in (_FINEST, _COARSEST)
    )
    high += _ABOVE
    best: tuple[bytes, _Rounded] | None = None
    while low <= high:
        step = (low + high) // 2
        trial = _rounded_at(step, codec, adapter, originals, tokens, state, initial, means)
        data = codec.close(trial.head, trial.groups)
        if len(data) <= size:
            high = step - 1
            # A finer step loses less, nearly always.
            if best is None or len(best[0]) > size or trial.weighted_error <= best[1].weighted_error:
                best = data, trial
        else:
            low = step + 1
            if best is None or size < len(data) < len(best[0]):
                best = data, trial
    assert best is not None
    return _measured(codec, adapter, *best)


def _prepared(
    codec: Codec, adapter: Adapter, vectors: Mapping[str, torch.Tensor], initial: InitialA | None
) -> tuple[Sequence[KindTokens], TaskState]:
    """Return the tokens of an adapter, and everything in its code that no step changes."""
    tokens = tokenize(adapter, codec.config, codec.sensitivity)
    refuse_overflow(tokens, codec.config)
    refuse_underflow(tokens)
    condition, subspace = codec.condition(vectors), codec.subspace(initial)
    (latent,) = codec.net.posterior(stacked([tokens]), condition[None])
    state = TaskState(condition, latent.round().clamp(-127, 127), subspace)
    return tokens, replace(state, subspace=replace(subspace, shifts=codec.quantizer.shifts(tokens, state)))


def _measured(codec: Codec, adapter: Adapter, data: bytes, tried: _Rounded) -> Encoded:
    """Decode a code and measure it; raise `GeneratorError` if that is not what was tried."""
    found = compare(codec, adapter, codec.decode(data), data)
    if not math.isclose(found.weighted_error, tried.weighted_error, rel_tol=_ALIKE, abs_tol=_ALIKE**2):
        raise GeneratorError("the code does not decode to what was encoded")
    return found


def _part_of(
    adapter: Adapter, tokens: Sequence[KindTokens], config: GeneratorConfig
) -> tuple[Adapter, Sequence[KindTokens]]:
    """Return every eighth layer of each kind of modules of an adapter, and its tokens."""
    layers = defaultdict[int, list[int]](list)
    for kind, layer in sorted(config.place_of(shape) for shape in adapter.layout):
        layers[kind].append(layer)
    chosen = {kind: found[(min(len(found), _PART) - 1) // 2 :: _PART] for kind, found in layers.items()}
    places = {(kind, layer) for kind, found in chosen.items() for layer in found}
    modules = tuple(module for module in adapter.modules if config.place_of(module.shape) in places)
    masks = [torch.isin(group.layer, torch.tensor(chosen[group.kind])) for group in tokens]
    parts = [group[mask] for group, mask in zip(tokens, masks, strict=True) if mask.any()]
    return replace(adapter, modules=modules), parts


_Tried = TypeVar("_Tried", bound=Measured)


def coarsest(expected: int, limits: Limits, encode: Callable[[int], _Tried], enough: float = 1.0) -> _Tried:
    """Return the result of the coarsest step (eighths of an octave) that keeps the limits, or of one that is near it.

    From the expected step the strides double until the limits begin or cease to be kept; then bisection goes on.

    Raises:
        GeneratorError: No step keeps the limits.
    """
    # A coarser step loses more, nearly always; what is returned keeps the limits in any case. A step whose error is
    # this share of a limit is coarse enough.
    lowest, highest = expected - _BELOW, expected + _ABOVE
    low, best = expected, encode(expected)
    high, stride = highest + 1, 1  # high: does not keep the limits, or is not to be tried
    while not limits.keeps(best):
        low, high, stride = low - stride, low, 2 * stride
        if low < lowest:
            fact = f"no code keeps the squared error at or below {limits.least:g}"
            raise GeneratorError(fact, hint="allow a larger error")
        best = encode(low)
    while high - low > 1 and limits.used(best) < enough:
        # No step is known yet that does not keep the limits: go on to coarser ones.
        middle, stride = (min(low + stride, highest), 2 * stride) if high > highest else ((low + high) // 2, stride)
        tried = encode(middle)
        if limits.keeps(tried):
            low, best = middle, tried
        else:
            high = middle
    return best


def compare(codec: Codec, adapter: Adapter, decoded: Adapter, data: bytes) -> Encoded:
    """Measure how far an adapter, decoded from these bytes, is from the one that was encoded."""
    plain, heavy = _Original.of(codec, adapter).parts(codec, decoded)
    return Encoded(data, relative(plain), relative(heavy), decoded)


def quantised(
    codec: Codec,
    group: KindTokens,
    state: TaskState,
    step: int,
    gain: int | None = None,
    means: dict[int, Means] | None = None,
) -> tuple[KindIntegers, KindTokens, KindTokens]:
    """Round the tokens of one kind, (n, in) and (n, out), and leave out the slots that are not worth their bits.

    Step and gain are log2 in eighths; norms are counted from the gain, by default the tokens' own mean. `means` keeps
    the predictions of each kind, which are the same at every step. Returns the integers of the slots that are kept, the
    tokens of these slots, and the tokens that the integers decode to.
    """
    slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
    gain, residuals = codec.quantizer.norm_residuals(slots, group.norm, gain)
    norms = codec.quantizer.norms(slots, gain, residuals)
    means = {} if means is None else means
    if group.kind not in means:
        means[group.kind] = codec.quantizer.means(slots, norms, state)
    mean = means[group.kind]
    sides = codec.quantizer.quantise(group, norms, state, step, mean)
    scales = codec.quantizer.scales(slots, norms, state.subspace, step)
    found = nonzeros_of(sides, scales)
    vectors = codec.quantizer.dequantise(slots, norms, state, step, found, means=mean)
    rebuilt = KindTokens(group.kind, group.layer, group.slot, norm_of(norms), *vectors)
    inputs, outputs, along = (torch.from_numpy(side) for side in sides)
    has_inputs = torch.cat([inputs, along], dim=1).any(dim=1)
    is_worth = worth_writing(group, rebuilt, has_inputs, outputs.any(dim=1))  # (n,)
    keep = written_slots(slots, is_worth.numpy())
    if keep.all():
        return KindIntegers(slots, gain, residuals, found), group, rebuilt
    kept = torch.from_numpy(keep)
    found = nonzeros_of(*([side[keep] for side in every] for every in (sides, scales)))
    return KindIntegers(slots[keep], gain, residuals[keep], found), group[kept], rebuilt[kept]


def strength_of(original: KindTokens, overlaps: torch.Tensor) -> int:
    """Return log2, in 64ths, of the factor that makes the decoded dW of a kind as long, along it, as the original.

    `overlaps` are the inner products of original and decoded dW in the kept slots, (n,).
    """
    # Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more of its
    # gain than the larger error of a full-strength one costs (docs/results/LOG.md).
    along, length = float(overlaps.sum()), squared_norm([original])
    if not 0 < along < math.inf:  # products of very large values overflow float32
        return 0
    return min(max(round(STRENGTHS * math.log2(length / along)), 0), _STRONGEST)


def _rounded_at(
    step: int,
    codec: Codec,
    adapter: Adapter,
    originals: Mapping[int, _Original],
    tokens: Sequence[KindTokens],
    state: TaskState,
    initial: InitialA | None,
    means: dict[int, Means] | None,
) -> _Rounded:
    """Round an adapter at one step, and measure what that decodes to: several kinds at a time, if they are large."""
    shape = len(codec.config.kinds), codec.config.layers  # (K, L)
    gains, strengths = np.zeros(shape[0], dtype=np.int16), np.zeros(shape, dtype=np.int8)
    kept = np.full(shape, ABSENT, dtype=np.uint16)
    for module in adapter.layout:
        kept[codec.config.place_of(module)] = 0
    places = {
        kind: [(kind, layer) for layer in np.flatnonzero(row != ABSENT).tolist()] for kind, row in enumerate(kept)
    }

    def rounded(original: KindTokens) -> tuple[KindIntegers, _Parts, _Parts]:
        kind = original.kind
        group, kept_tokens, rebuilt = quantised(codec, original, state, step, means=means)
        layers = group.slots.layer
        gains[kind] = group.gain
        strengths[kind, np.unique(layers)] = strength_of(original, slot_overlaps(kept_tokens, rebuilt))
        np.add.at(kept[kind], layers, 1)
        decoded = codec.adapter_of([strengthened(rebuilt, strengths[kind])], places[kind], None)
        return group, *originals[kind].parts(codec, decoded)

    is_small = sum(group.inputs.numel() for group in tokens) < _WORTH_A_THREAD * len(tokens)
    with side_by_side(1 if is_small else None) as each:
        found = list(each(rounded, tokens))
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
    groups, plain, heavy = zip(*found, strict=True) if found else ((), (), ())
    return _Rounded(head, groups, relative(chain.from_iterable(plain)), relative(chain.from_iterable(heavy)))


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)
