"""The coarsest quantiser step whose bytes keep a limit, found by trying.

Adapter -> code -> adapter, and task vectors -> adapter, under one generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.layout import ModuleShape
from icmlora.adapter.metrics import relative_dw_error
from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.code import ABSENT, Code, CodeHead, KindIntegers, generator_of, pack, unpack, written_slots
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import VIEWS, TaskState, predicted_tokens
from icmlora.generator.file import TrainedGenerator
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.initial_a.subspace import InitialSubspace, initial_subspace
from icmlora.generator.objective import water_level, worth_writing
from icmlora.generator.quantizer import Slots, TokenQuantizer
from icmlora.generator.scales import OCTAVE, STRENGTHS
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.tokens import (
    KindTokens,
    detokenize,
    refuse_overflow,
    slot_overlaps,
    squared_norm,
    tokenize,
    weighted,
)
from icmlora.io.devices import one_thread

# Steps tried above and below the one that theory gives for a tolerance, in eighths of an octave.
_BELOW, _ABOVE = 4 * OCTAVE, 2 * OCTAVE
# How often the search goes down by `_BELOW` again: 2^-16 of the expected step is below what float32 resolves.
_RETRIES = 3


@dataclass(frozen=True)
class Encoded:
    """A code, or a residual beside one, and what it keeps of its adapter."""

    data: bytes
    dw_error: float
    """Relative squared error of dW, of the adapter decoded from it."""
    weighted_error: float
    """The same of dW weighted by the sensitivity of its channels; equal to it under even weights."""


@dataclass(frozen=True)
class Limits:
    """What has to be kept; at least one of the two."""

    tolerance: float | None = None
    """Largest weighted error."""
    max_error: float | None = None
    """Largest relative dW error."""

    @property
    def least(self) -> float:
        """The smaller limit."""
        return min(math.inf if limit is None else limit for limit in (self.tolerance, self.max_error))

    def keeps(self, encoded: Encoded) -> bool:
        """Say whether a code keeps them."""
        pairs = ((encoded.weighted_error, self.tolerance), (encoded.dw_error, self.max_error))
        return all(limit is None or error <= limit for error, limit in pairs)

    def expected_step(self, tokens: Sequence[KindTokens], sensitivity: Sensitivity, subspace: InitialSubspace) -> int:
        """Return the step, in eighths of an octave, that theory gives for the smaller limit."""
        return math.floor(OCTAVE * math.log2(water_level(tokens, self.least, sensitivity, subspace)))


def coarsest(expected: int, limits: Limits, encode: Callable[[int], Encoded]) -> Encoded:
    """Return what the coarsest step that keeps the limits gives, found by bisection.

    Args:
        expected: Where the search begins.
        limits: What has to be kept.
        encode: Makes the code, or the residual, of one step.

    Raises:
        GeneratorError: No step does.
    """
    low, high = expected - _BELOW, expected + _ABOVE
    best = encode(low)
    for _ in range(_RETRIES):
        if limits.keeps(best):
            break
        low, high = low - _BELOW, low - 1
        best = encode(low)
    if not limits.keeps(best):
        raise GeneratorError(f"no code keeps an error of {limits.least:g}", hint="allow a larger error")
    while low < high:  # a coarser step loses more, nearly always; `best` keeps the limits in any case
        middle = (low + high + 1) // 2
        tried = encode(middle)
        if limits.keeps(tried):
            low, best = middle, tried
        else:
            high = middle - 1
    return best


_STRONGEST = STRENGTHS  # a code is made at most twice as strong
_SUBSPACES = 4


@dataclass(frozen=True, eq=False)
class OpenCode:
    """A code as integers."""

    head: CodeHead
    state: TaskState
    groups: tuple[KindIntegers, ...]


class Codec:
    """Encode and decode the adapters of one generator. Works on the CPU in float32.

    Under a tolerance near 1 the code of an adapter that is predicted well holds condition and latent, and no integers.
    """

    def __init__(self, generator: TrainedGenerator) -> None:
        self.generator = generator
        self._net = generator.net.eval()
        self.sensitivity = self._net.sensitivity
        self.quantizer = TokenQuantizer(self._net)
        # Drawing an initial A takes a third of the time of decoding. All codes that are tried for an adapter have the
        # same one, and tasks often share it: alike in ranks and modules, trained under one seed.
        config, sensitivity = self.config, self.sensitivity  # not self, which the cache would keep alive
        self._subspace = lru_cache(_SUBSPACES)(lambda initial: initial_subspace(initial, config, sensitivity))

    @property
    def config(self) -> GeneratorConfig:
        """The generator's configuration."""
        return self.generator.net.config

    @torch.no_grad()
    def encode(
        self,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None = None,
        *,
        tolerance: float | None = None,
        max_error: float | None = None,
    ) -> Encoded:
        """Encode one adapter with the coarsest quantiser step found that keeps a limit.

        Args:
            adapter: Any adapter that the generator covers.
            vectors: The task's vectors by view; may be empty.
            initial: Where the A that its training began with was drawn, if that is known: the code is shorter then.
            tolerance: Largest weighted error; the generator's own where `max_error` is not given either.
            max_error: Largest relative dW error.

        Returns:
            A code that keeps every limit that was given.

        Raises:
            GeneratorError: The generator does not cover the adapter, or float32 cannot keep the limits.
            AdapterRefused: Its values are too large for float32.
        """
        limits = Limits(tolerance, max_error)
        if limits == Limits():
            limits = Limits(self.config.tolerance)
        tokens = tokenize(adapter, self.config, self.sensitivity)
        refuse_overflow(tokens, self.config)
        condition = self._condition(vectors)
        subspace = self._subspace(initial)
        state = TaskState(condition, self._net.posterior(tokens, condition).round().clamp(-127, 127), subspace)
        state = replace(state, subspace=replace(subspace, shifts=self.quantizer.shifts(tokens, state)))
        expected = limits.expected_step(tokens, self.sensitivity, subspace)
        return coarsest(expected, limits, lambda step: self._encode_at(step, adapter, tokens, state, initial))

    @torch.no_grad()
    @one_thread()
    def decode(self, data: bytes) -> Adapter:
        """Decode one code.

        Raises:
            CodeError: Damaged, or made by another generator.
        """
        opened = self.open(data)
        tokens = (self.dequantised(group, opened.state, opened.head.step) for group in opened.groups)
        return self.assemble(tokens, opened.head, opened.head.strengths)

    def dequantised(self, group: KindIntegers, state: TaskState, step: int) -> KindTokens:
        """Turn integers of one kind into tokens, before their strengths."""
        norms = self.quantizer.norms(group.slots, group.gain, group.residuals)
        return self.quantizer.dequantise(group.slots, norms, state, step, group.sides, group.scales)

    def assemble(self, tokens: Iterable[KindTokens], head: CodeHead, strengths: NDArray[np.int8]) -> Adapter:
        """Make an adapter of a code's modules from tokens, which are changed on the way.

        Args:
            tokens: At most one entry per kind, one after the other.
            head: Says which modules there are.
            strengths: Per kind and layer, shape (K, L).

        Raises:
            CodeError: Values that float32 does not hold.
        """
        modules = [(int(kind), int(layer)) for kind, layer in zip(*np.nonzero(head.kept != ABSENT), strict=True)]
        strong = (_strengthened(group, strengths[group.kind]) for group in tokens)
        adapter = detokenize(strong, self.config, self.sensitivity, modules=modules, task_type=head.task_type)
        if not all(_is_finite(factor) for module in adapter.modules for factor in (module.a, module.b)):
            raise CodeError("the code's values are out of float32's range")
        return adapter

    def open(self, data: bytes) -> OpenCode:
        """Read a code's integers without decoding them.

        Raises:
            CodeError: Damaged, or made by another generator.
        """
        digest = generator_of(data)
        if digest != self.generator.digest:
            raise CodeError(f"the code belongs to generator {digest[:12]}, not {self.generator.digest[:12]}")
        code = Code.from_bytes(data, self.config)
        subspace = self._subspace(code.head.initial)
        subspace = replace(subspace, shifts=code.head.shifts, boosts=code.head.boosts)
        state = TaskState(_floats(code.head.condition), _floats(code.head.latent), subspace)
        return OpenCode(code.head, state, tuple(unpack(self.quantizer, code.head, subspace, code.words)))

    def close(self, head: CodeHead, groups: Sequence[KindIntegers]) -> bytes:
        """Write a code of these integers."""
        words = pack(self.quantizer, groups)
        return Code(self.generator.digest, head, words).to_bytes(self.config)

    @torch.no_grad()
    def measure(self, adapter: Adapter, data: bytes) -> Encoded:
        """Decode a code and compare it with the adapter that it was made of."""
        return self.compare(adapter, self.decode(data), data)

    def compare(self, adapter: Adapter, decoded: Adapter, data: bytes) -> Encoded:
        """Say what the bytes that an adapter was decoded from keep of the one that they were made of."""
        pair = (weighted(which, self.config, self.sensitivity) for which in (adapter, decoded))
        return Encoded(data, relative_dw_error(adapter, decoded), relative_dw_error(*pair))

    @torch.no_grad()
    def generate(
        self,
        vectors: Mapping[str, torch.Tensor],
        layout: Sequence[ModuleShape],
        *,
        task_type: str | None,
        seed: int | None = None,
    ) -> Adapter:
        """Make an adapter from task vectors alone, with z at the prior's mean (or sampled, with a seed).

        Args:
            vectors: By view, each (hidden,).
            layout: The modules to make and their ranks.
            task_type: PEFT's task type.
            seed: Sample z from the prior p(z|c) instead of taking its mean.

        Raises:
            GeneratorError: A module that the generator does not cover.
        """
        modules = sorted((*self.config.place_of(shape), shape.rank) for shape in layout)
        condition = self._condition(vectors)
        mean, scale = self._net.latent_prior(condition)
        if seed is not None:
            mean = mean + scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        state = TaskState(condition, mean.round().clamp(-127, 127), self._subspace(None))
        tokens = predicted_tokens(self._net, state, modules)
        pairs = [(kind, layer) for kind, layer, _ in modules]
        return detokenize(tokens, self.config, self.sensitivity, modules=pairs, task_type=task_type)

    def _condition(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        size = self.config.condition_size
        wrong = [len(vectors[view]) for view in VIEWS if size and view in vectors and vectors[view].shape != (size,)]
        if wrong:
            raise GeneratorError(f"a task vector has {wrong[0]} values; the generator was trained on {size}")
        return self._net.embed(vectors).round()

    def _encode_at(
        self, step: int, adapter: Adapter, tokens: Sequence[KindTokens], state: TaskState, initial: InitialA | None
    ) -> Encoded:
        shape = len(self.config.kinds), self.config.layers
        gains, strengths = np.zeros(shape[0], dtype=np.int16), np.zeros(shape, dtype=np.int8)
        kept = np.full(shape, ABSENT, dtype=np.uint8)
        for module in adapter.layout:
            kept[self.config.place_of(module)] = 0
        groups: list[KindIntegers] = []
        for original in tokens:
            group, kept_of_it, rebuilt = self.quantised(original, state, step)
            groups.append(group)
            gains[group.slots.kind] = group.gain
            strength = strength_of(original, slot_overlaps(kept_of_it, rebuilt))
            strengths[group.slots.kind, np.unique(group.slots.layer)] = strength
            np.add.at(kept[group.slots.kind], group.slots.layer, 1)
        task = _bytes(state.condition), _bytes(state.latent)
        head = CodeHead(
            step,
            *task,
            gains,
            strengths,
            kept,
            state.subspace.shifts,
            state.subspace.boosts,
            initial,
            adapter.task_type,
        )
        return self.measure(adapter, self.close(head, groups))

    def quantised(
        self, group: KindTokens, state: TaskState, step: int, gain: int | None = None
    ) -> tuple[KindIntegers, KindTokens, KindTokens]:
        """Round tokens of one kind, and leave out the slots that are not worth their bits.

        Args:
            group: The tokens.
            state: The task's.
            step: log2 of the quantiser step, in eighths.
            gain: What norms are counted from; the tokens' own mean if it is not given.

        Returns:
            The integers of the slots that are kept, the tokens of these slots, and what the integers give back of them.
        """
        slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
        gain, residuals = self.quantizer.norm_residuals(slots, group.norm, gain)
        norms = self.quantizer.norms(slots, gain, residuals)
        sides = self.quantizer.quantise(group, norms, state, step)
        scales = self.quantizer.scales(slots, norms, state.subspace, step)
        rebuilt = self.quantizer.dequantise(slots, norms, state, step, sides, scales)
        inputs, outputs, along = (torch.from_numpy(side) for side in sides)
        alive = worth_writing(group, rebuilt, (torch.cat([inputs, along], dim=1), outputs))
        keep = written_slots(slots, alive.numpy())
        kept = torch.from_numpy(keep)
        return KindIntegers(slots, gain, residuals, *sides, scales)[keep], group[kept], rebuilt[kept]


def _strengthened(tokens: KindTokens, strengths: NDArray[np.int8]) -> KindTokens:
    """Multiply the tokens of each layer by its strength, shape (L,), in place."""
    factors = torch.exp2(torch.from_numpy(strengths.astype(np.float32)) / STRENGTHS)
    tokens.outputs.mul_(factors[tokens.layer][:, None])
    return tokens


def strength_of(original: KindTokens, overlaps: torch.Tensor) -> int:
    """Return the strength that makes the decoded dW of a kind as long along the original as the original is.

    Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more of its
    gain than the larger error of a full-strength one costs (docs/results/LOG.md).
    """
    along, length = float(overlaps.sum()), squared_norm([original])
    if not 0 < along < math.inf:  # products of very large values overflow float32
        return 0
    return min(max(round(STRENGTHS * math.log2(length / along)), 0), _STRONGEST)


def _is_finite(values: torch.Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN is the smallest and the largest; a tenth of the time of torch.isfinite
    return math.isfinite(low) and math.isfinite(high)


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)


def _floats(values: NDArray[np.int8]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
