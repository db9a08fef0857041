"""Adapter -> code -> adapter, and task vectors -> adapter, under one generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.code import ABSENT, Code, CodeHead, generator_of
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import VIEWS, TaskState
from icmlora.generator.generation import predicted_tokens
from icmlora.generator.generator_file import Generator
from icmlora.generator.objective import water_level, worth_writing
from icmlora.generator.packing import KindIntegers, pack, unpack, written_slots
from icmlora.generator.quantizer import Quantizer, Slots
from icmlora.generator.scales import OCTAVE
from icmlora.generator.tokens import KindTokens, detokenize, slot_overlaps, squared_norm, tokenize, weighted
from icmlora.layout import ModuleShape
from icmlora.metrics import relative_dw_error

# Steps tried above and below the one that theory gives for a tolerance, in eighths of an octave.
_BELOW, _ABOVE = 4 * OCTAVE, 2 * OCTAVE
# How often the search goes down by `_BELOW` again: 2^-16 of the expected step is below what float32 resolves.
_RETRIES = 3
_STRENGTHS = 256


@dataclass(frozen=True)
class Encoded:
    """A code and what it keeps of its adapter."""

    data: bytes
    dw_error: float
    """Relative squared error of dW, of the adapter decoded from the code."""
    weighted_error: float
    """The same of dW weighted by the sensitivity of its channels; equal to it under even weights."""


class Codec:
    """Encode and decode the adapters of one generator. Works on the CPU in float32."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._net = generator.net.eval()
        self._sensitivity = self._net.sensitivity
        self._quantizer = Quantizer(self._net)

    @property
    def config(self) -> GeneratorConfig:
        """The generator's configuration."""
        return self.generator.net.config

    @torch.no_grad()
    def encode(
        self,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        *,
        tolerance: float | None = None,
        max_error: float | None = None,
    ) -> Encoded:
        """Encode one adapter with the coarsest quantiser step found that keeps a limit.

        Args:
            adapter: Any adapter that the generator covers.
            vectors: The task's vectors by view; may be empty.
            tolerance: Largest weighted error; the generator's own where `max_error` is not given either.
            max_error: Largest relative dW error.

        Returns:
            A code that keeps every limit that was given.

        Raises:
            GeneratorError: The generator does not cover the adapter, or float32 cannot keep the limits.
        """
        if tolerance is None and max_error is None:
            tolerance = self.config.tolerance
        limits = (math.inf if tolerance is None else tolerance, math.inf if max_error is None else max_error)
        tokens = tokenize(adapter, self.config, self._sensitivity)
        condition = self._condition(vectors)
        state = TaskState(condition, self._net.posterior(tokens, condition).round().clamp(-127, 127))
        step = math.floor(OCTAVE * math.log2(water_level(tokens, min(limits), self._sensitivity)))
        best = _coarsest(step, limits, lambda tried: self._encode_at(tried, adapter, tokens, state))
        if best is None:
            raise GeneratorError(f"no code keeps an error of {min(limits):g}", hint="allow a larger error")
        return best

    @torch.no_grad()
    def decode(self, data: bytes) -> Adapter:
        """Decode one code.

        Raises:
            CodeError: Damaged, or made by another generator.
        """
        digest = generator_of(data)
        if digest != self.generator.digest:
            raise CodeError(f"the code belongs to generator {digest[:12]}, not {self.generator.digest[:12]}")
        code = Code.from_bytes(data, self.config)
        head, state = code.head, TaskState(_floats(code.head.condition), _floats(code.head.latent))
        tokens = [self._dequantised(group, head, state) for group in unpack(self._quantizer, head, code.words)]
        modules = [(int(kind), int(layer)) for kind, layer in zip(*np.nonzero(head.kept != ABSENT), strict=True)]
        adapter = detokenize(tokens, self.config, self._sensitivity, modules=modules, task_type=head.task_type)
        if not all(torch.isfinite(factor).all() for module in adapter.modules for factor in (module.a, module.b)):
            raise CodeError("the code's values are out of float32's range")
        return adapter

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
        state = TaskState(condition, mean.round().clamp(-127, 127))
        tokens = predicted_tokens(self._net, state, modules)
        pairs = [(kind, layer) for kind, layer, _ in modules]
        return detokenize(tokens, self.config, self._sensitivity, modules=pairs, task_type=task_type)

    def _condition(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        size = self.config.condition_size
        wrong = [len(vectors[view]) for view in VIEWS if size and view in vectors and vectors[view].shape != (size,)]
        if wrong:
            raise GeneratorError(f"a task vector has {wrong[0]} values; the generator was trained on {size}")
        return self._net.embed(vectors).round()

    def _encode_at(self, step: int, adapter: Adapter, tokens: Sequence[KindTokens], state: TaskState) -> Encoded:
        strengths = np.zeros(len(self.config.kinds), dtype=np.uint8)
        groups: list[KindIntegers] = []
        for original in tokens:
            integers, strengths[original.kind] = self._quantised(original, state, step)
            groups.append(integers)
        gains = np.zeros(len(strengths), dtype=np.int16)
        kept = np.full((len(gains), self.config.layers), ABSENT, dtype=np.uint8)
        for shape in adapter.layout:
            kept[self.config.place_of(shape)] = 0
        for group in groups:
            gains[group.slots.kind] = group.gain
            np.add.at(kept[group.slots.kind], group.slots.layer, 1)
        head = CodeHead(step, _bytes(state.condition), _bytes(state.latent), gains, strengths, kept, adapter.task_type)
        data = Code(self.generator.digest, head, pack(self._quantizer, groups, step)).to_bytes()
        decoded = self.decode(data)
        pair = (weighted(which, self.config, self._sensitivity) for which in (adapter, decoded))
        return Encoded(data, relative_dw_error(adapter, decoded), relative_dw_error(*pair))

    def _quantised(self, group: KindTokens, state: TaskState, step: int) -> tuple[KindIntegers, int]:
        slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
        gain, residuals = self._quantizer.norm_residuals(slots, group.norm)
        norms = self._quantizer.norms(slots, gain, residuals)
        inputs, outputs = self._quantizer.quantise(group, norms, state, step)
        rebuilt = self._quantizer.dequantise(slots, norms, state, step, (inputs, outputs))
        alive = worth_writing(group, rebuilt, (torch.from_numpy(inputs), torch.from_numpy(outputs)))
        keep = written_slots(slots, alive.numpy())
        kept = torch.from_numpy(keep)
        integers = KindIntegers(slots, gain, residuals, inputs, outputs)[keep]
        return integers, _strength(group, slot_overlaps(group[kept], rebuilt[kept]))

    def _dequantised(self, group: KindIntegers, head: CodeHead, state: TaskState) -> KindTokens:
        norms = self._quantizer.norms(group.slots, group.gain, group.residuals)
        tokens = self._quantizer.dequantise(group.slots, norms, state, head.step, (group.inputs, group.outputs))
        return replace(tokens, outputs=tokens.outputs * (1 + int(head.strengths[group.slots.kind]) / _STRENGTHS))


def _strength(original: KindTokens, overlaps: torch.Tensor) -> int:
    """Return the strength that makes the decoded dW of a kind as long along the original as the original is.

    Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more of its
    gain than the larger error of a full-strength one costs (docs/results/LOG.md).
    """
    along, length = float(overlaps.sum()), squared_norm([original])
    if along <= 0:
        return 0
    return min(max(round(_STRENGTHS * (length / along - 1)), 0), _STRENGTHS - 1)


def _coarsest(expected: int, limits: tuple[float, float], encode: Callable[[int], Encoded]) -> Encoded | None:
    """Return the code of the coarsest step that keeps the limits, found by bisection; None if no step does.

    Args:
        expected: Where the search begins.
        limits: Largest weighted error and largest relative dW error.
        encode: Makes the code of one step.
    """

    def keeps(encoded: Encoded) -> bool:
        return encoded.weighted_error <= limits[0] and encoded.dw_error <= limits[1]

    low, high = expected - _BELOW, expected + _ABOVE
    best = encode(low)
    for _ in range(_RETRIES):
        if keeps(best):
            break
        low, high = low - _BELOW, low - 1
        best = encode(low)
    if not keeps(best):
        return None
    while low < high:  # a coarser step loses more, nearly always; `best` keeps the limits in any case
        middle = (low + high + 1) // 2
        tried = encode(middle)
        if keeps(tried):
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)


def _floats(values: NDArray[np.int8]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
