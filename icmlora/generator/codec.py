"""Adapter -> code -> adapter, and task vectors -> adapter, under one generator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter import Adapter
from icmlora.errors import CodeError
from icmlora.generator import entropy
from icmlora.generator.code import ABSENT, Code, CodeHead
from icmlora.generator.config import GeneratorConfig, kind_of
from icmlora.generator.cvae import TaskState
from icmlora.generator.entropy import Integers
from icmlora.generator.generator_file import Generator
from icmlora.generator.objective import water_level
from icmlora.generator.quantizer import Quantizer, Slots
from icmlora.generator.scales import OCTAVE
from icmlora.generator.tokens import KindTokens, detokenize, squared_norm, tokenize
from icmlora.layout import ModuleShape
from icmlora.metrics import relative_dw_error

Norms = NDArray[np.int64]

# Steps tried above and below the one that theory gives for a tolerance, in eighths of an octave.
_BELOW, _ABOVE = 4 * OCTAVE, 2 * OCTAVE


@dataclass(frozen=True)
class Encoded:
    """A code and what it keeps of its adapter."""

    data: bytes
    dw_error: float
    """Relative squared error of dW, of the adapter decoded from the code."""


class Codec:
    """Encode and decode the adapters of one generator. Works on the CPU in float32."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._net = generator.net.eval()
        self._quantizer = Quantizer(self._net)

    @property
    def config(self) -> GeneratorConfig:
        """The generator's configuration."""
        return self.generator.net.config

    @torch.no_grad()
    def encode(self, adapter: Adapter, vectors: Mapping[str, torch.Tensor], tolerance: float | None = None) -> Encoded:
        """Encode one adapter with the coarsest quantiser step that keeps the tolerance.

        Args:
            adapter: Any adapter that the generator covers.
            vectors: The task's vectors by view; may be empty.
            tolerance: Largest relative dW error; the generator's own by default.

        Raises:
            GeneratorError: The generator does not cover the adapter.
        """
        limit = self.config.tolerance if tolerance is None else tolerance
        tokens = tokenize(adapter, self.config)
        condition = self._net.embed(vectors).round()
        state = TaskState(condition, self._net.posterior(tokens, condition).round().clamp(-127, 127))
        energy = squared_norm(tokens)
        expected = math.floor(OCTAVE * math.log2(water_level(tokens, limit))) if energy else 0
        low, high = expected - _BELOW, expected + _ABOVE
        best = self._encode_at(low, adapter, tokens, state)
        while low < high:  # a coarser step loses more; bisection ends at the last step that keeps the limit
            middle = (low + high + 1) // 2
            tried = self._encode_at(middle, adapter, tokens, state)
            if tried.dw_error <= limit:
                low, best = middle, tried
            else:
                high = middle - 1
        return best

    @torch.no_grad()
    def decode(self, data: bytes) -> Adapter:
        """Decode one code.

        Raises:
            CodeError: Damaged, or made by another generator.
        """
        code = Code.from_bytes(data, self.config)
        if code.generator != self.generator.digest:
            raise CodeError(f"the code belongs to generator {code.generator[:12]}, not {self.generator.digest[:12]}")
        return self._reconstruct(code)

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
        condition = self._net.embed(vectors).round()
        mean, scale = self._net.latent_prior(condition)
        if seed is not None:
            mean = mean + scale * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        state = TaskState(condition, mean.round().clamp(-127, 127))
        gains = self._net.gains(state)
        index = {kind: number for number, kind in enumerate(self.config.kinds)}
        modules = sorted((index[kind_of(shape)[0]], kind_of(shape)[1], shape.rank) for shape in layout)
        groups = []
        for kind in sorted({kind for kind, _, _ in modules}):
            rows = [(layer, slot) for k, layer, rank in modules if k == kind for slot in range(rank)]
            layer, slot = torch.tensor(rows).T
            norm = torch.exp2(self._net.norm_mean[kind, layer, slot] + gains[kind])
            mean_of = self._net.decode(kind, layer, slot, state)
            groups.append(_resized(KindTokens(kind, layer, slot, norm, mean_of.inputs, mean_of.outputs)))
        pairs = [(kind, layer) for kind, layer, _ in modules]
        return detokenize(groups, self.config, modules=pairs, task_type=task_type)

    def _encode_at(self, step: int, adapter: Adapter, tokens: Sequence[KindTokens], state: TaskState) -> Encoded:
        kept = np.full((len(self.config.kinds), self.config.layers), ABSENT, dtype=np.uint8)
        for shape in adapter.layout:
            kind, layer = kind_of(shape)
            kept[self.config.kinds.index(kind), layer] = 0
        gains = np.zeros(len(self.config.kinds), dtype=np.int16)
        residuals: list[Integers] = []
        tokens_coded: list[tuple[Integers, Integers]] = []
        slots_coded: list[Slots] = []
        norms_coded: list[Norms] = []
        for group in tokens:
            slots = Slots(group.kind, group.layer.numpy(), group.slot.numpy())
            gain, residual = self._quantizer.norm_residuals(slots, group.norm)
            norms = self._quantizer.norms(slots, gain, residual)
            integers = self._quantizer.quantise(group, norms, state, step)
            alive = np.logical_and(*[(part != 0).any(axis=1) for part in integers])
            np.maximum.at(kept[group.kind], slots.layer[alive], (slots.slot[alive] + 1).astype(np.uint8))
            coded = slots.slot < kept[group.kind, slots.layer]
            gains[group.kind] = gain
            residuals.append(residual[coded])
            slots_coded.append(slots[coded])
            norms_coded.append(norms[coded])
            tokens_coded.append((integers[0][coded], integers[1][coded]))
        writer = entropy.Writer()
        writer.write(np.concatenate(residuals), self._norm_scales(slots_coded))
        flat = [side.ravel() for pair in tokens_coded for side in pair]
        writer.write(np.concatenate(flat), self._token_scales(slots_coded, norms_coded, step))
        head = CodeHead(step, _bytes(state.condition), _bytes(state.latent), gains, kept, adapter.task_type)
        code = Code(self.generator.digest, head, writer.to_bytes())
        data = code.to_bytes()
        return Encoded(data, relative_dw_error(adapter, self.decode(data)))

    def _reconstruct(self, code: Code) -> Adapter:
        head, reader = code.head, entropy.Reader(code.words)
        state = TaskState(_floats(head.condition), _floats(head.latent))
        slots = [_slots(kind, row) for kind, row in enumerate(head.kept) if (row != ABSENT).any()]
        residuals = reader.read(self._norm_scales(slots))
        norms = [
            self._quantizer.norms(group, int(head.gains[group.kind]), part)
            for group, part in zip(slots, _split(residuals, [len(group.layer) for group in slots]), strict=True)
        ]
        flat = reader.read(self._token_scales(slots, norms, head.step))
        reader.finish()
        shapes = [(len(group.layer), size) for group in slots for size in self._sizes(group)]
        parts = [part.reshape(shape) for part, shape in zip(_split(flat, [a * b for a, b in shapes]), shapes, strict=True)]
        tokens = [
            self._quantizer.dequantise(group, norm, state, head.step, (parts[2 * number], parts[2 * number + 1]))
            for number, (group, norm) in enumerate(zip(slots, norms, strict=True))
        ]
        modules = [(int(kind), int(layer)) for kind, layer in zip(*np.nonzero(head.kept != ABSENT), strict=True)]
        return detokenize(tokens, self.config, modules=modules, task_type=head.task_type)

    def _norm_scales(self, slots: Sequence[Slots]) -> Integers:
        return np.concatenate([self._quantizer.norm_scales(group) for group in slots])

    def _token_scales(self, slots: Sequence[Slots], norms: Sequence[Norms], step: int) -> Integers:
        """Scale index of every integer, in the order in which they are coded."""
        scales = []
        for group, norm in zip(slots, norms, strict=True):
            for scale, size in zip(self._quantizer.scales(group, norm, step), self._sizes(group), strict=True):
                scales.append(np.repeat(scale, size))
        return np.concatenate(scales)

    def _sizes(self, slots: Slots) -> tuple[int, int]:
        kind = self.config.kinds[slots.kind]
        return kind.inputs, kind.outputs


def _slots(kind: int, kept: NDArray[np.uint8]) -> Slots:
    counts = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(counts)), counts)
    slot = np.concatenate([np.arange(count) for count in counts])
    return Slots(kind, layer, slot)


def _split(values: Integers, counts: Sequence[int]) -> list[Integers]:
    return np.split(values, np.cumsum(counts)[:-1])


def _resized(group: KindTokens) -> KindTokens:
    """Scale predicted directions to tokens whose dW lies between least squares and the expected size.

    The mean direction of uncertain tokens is shorter than one, and dW shrinks with its square. Least squares wants
    that; a working adapter needs more. The size is raised half way, in logarithms, to the one predicted for dW.
    """
    confidence = group.inputs.norm(dim=1) * group.outputs.norm(dim=1)  # (n,)
    predicted = (group.norm * confidence).square().sum().sqrt()
    expected = group.norm.square().sum().sqrt()
    factor = (expected / predicted.clamp_min(1e-12)).sqrt().clamp(max=1e3) if predicted > 0 else predicted
    root = group.norm[:, None] * factor.sqrt()
    return KindTokens(group.kind, group.layer, group.slot, group.norm, root * group.inputs, root * group.outputs)


def _bytes(values: torch.Tensor) -> NDArray[np.int8]:
    return values.numpy().astype(np.int8)


def _floats(values: NDArray[np.int8]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
