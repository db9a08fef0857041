"""A code whose integers are real numbers for the time being, so that gradient steps can change them.

    code ──open──▶ values in steps, log2 strengths ──round, with a straight-through gradient──▶ factors of each module
                            │                                                                        (what it does)
                            └──▶ bits under the coder's scales (what it costs)
    rounded values ──close──▶ code of the same form

Values start where the adapter has them, not where they were rounded to. Slots that the code leaves out stay left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from icmlora.adapter.model import Adapter
from icmlora.base_models.factors import Factors
from icmlora.generator.code_length import bin_bits
from icmlora.generator.decoder import Decoder
from icmlora.generator.entropy_coding import LIMIT, Integers, clip
from icmlora.generator.packing import KindIntegers
from icmlora.generator.quantizer import norm_of
from icmlora.generator.scales import OCTAVE, SMALLEST, STRENGTHS, centre_table
from icmlora.generator.tokens import KindTokens, tokenize


@dataclass(frozen=True, eq=False)
class _Part:
    """One module kind of a code: the parameters, and what stays fixed."""

    integers: KindIntegers
    modules: list[tuple[int, int, int]]  # layer, first and last but one of its n slots
    slot: torch.Tensor  # int64, shape (n,)
    root: torch.Tensor  # square roots of the norms, shape (n, 1)
    means: tuple[torch.Tensor, torch.Tensor]  # the generator's prediction, shapes (n, in) and (n, out)
    # In quantiser steps from the prediction, shapes (n, in), (n, out) and, along the initial subspace, (n, R).
    values: tuple[nn.Parameter, nn.Parameter, nn.Parameter]
    scales: tuple[torch.Tensor, ...]  # indices of the scales that these values are coded under, of the same shapes
    widths: tuple[torch.Tensor, ...]  # the scales themselves
    strength: nn.Parameter  # log2 of the factor that each layer's dW is multiplied by, shape (L,)
    boost: nn.Parameter  # log2 of the factor for each rank slot's inputs across the initial subspace, shape (S,)
    boosted: torch.Tensor  # 1 where a slot's module has an initial subspace, else 0; shape (n, 1)


class RelaxedCode:
    """The code of one adapter, while an optimiser changes it on a device."""

    def __init__(self, codec: Decoder, adapter: Adapter, code: bytes, device: torch.device | None = None) -> None:
        self._codec, self._opened = codec, codec.open(code)
        self._device = device = device or torch.device("cpu")
        self._subspace, self._weights = self._opened.state.subspace.to(device), codec.sensitivity.to(device)
        table, starts = centre_table()
        self._centres = torch.from_numpy(table).to(device), torch.from_numpy(starts).to(device)
        self._step = 2.0 ** (self._opened.head.step / OCTAVE)
        tokens = {group.kind: group for group in tokenize(adapter, codec.config, codec.sensitivity)}
        with torch.no_grad():
            self._parts = [self._part(group, tokens[group.slots.kind]) for group in self._opened.groups]

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameters that are rounded to integers."""
        return [values for part in self._parts for values in part.values]

    @property
    def strengths(self) -> list[nn.Parameter]:
        """The parameters that scale modules, and their inputs across the initial subspace; in octaves."""
        return [factor for part in self._parts for factor in (part.strength, part.boost)]

    def factors(self) -> Factors:
        """Return the factors that the rounded code decodes to, with gradients to values and strengths."""
        return dict(factors for part in self._parts for factors in self._modules(part))

    def bits(self) -> torch.Tensor:
        """Return the length of the values under the coder's tables, in bits; they need not be whole numbers."""
        total = torch.zeros((), device=self._device)
        for part in self._parts:
            for values, widths in zip(part.values, part.widths, strict=True):
                total = total + bin_bits(values, widths).sum()
        return total

    def to_code(self) -> bytes:
        """Round all parameters and write the code."""
        strengths, boosts = self._opened.head.strengths.copy(), self._opened.head.boosts.copy()
        groups = []
        for part in self._parts:
            inputs, outputs, along = (_whole(values) for values in part.values)
            groups.append(replace(part.integers, inputs=inputs, outputs=outputs, along=along))
            kind, layers = part.integers.slots.kind, np.unique(part.integers.slots.layer)
            strengths[kind, layers] = _stored(part.strength)[layers]
            boosts[kind] = _stored(part.boost)
        head = replace(self._opened.head, strengths=strengths, boosts=boosts)
        return self._codec.close(head, groups)

    def _part(self, integers: KindIntegers, tokens: KindTokens) -> _Part:
        quantizer, head, state = self._codec.quantizer, self._opened.head, self._opened.state
        slots = integers.slots
        # The tokens of the slots that the code has, in its order.
        written = set(zip(slots.layer.tolist(), slots.slot.tolist(), strict=True))
        places = zip(tokens.layer.tolist(), tokens.slot.tolist(), strict=True)
        kept = tokens[torch.tensor([place in written for place in places], dtype=torch.bool)]
        norms = quantizer.norms(slots, integers.gain, integers.residuals)
        inputs, outputs, along = (
            nn.Parameter(side.float().to(self._device)) for side in quantizer.in_steps(kept, norms, state, head.step)
        )
        left, right = (mean.to(self._device) for mean in quantizer.means(slots, norms, state))
        scales = tuple(torch.from_numpy(indices).to(self._device) for indices in integers.scales)
        layers, firsts, counts = np.unique(slots.layer, return_index=True, return_counts=True)  # layers are ascending
        known = torch.from_numpy(state.subspace.knows(slots.kind)[slots.layer])
        return _Part(
            integers=integers,
            modules=list(zip(layers.tolist(), firsts.tolist(), (firsts + counts).tolist(), strict=True)),
            slot=torch.from_numpy(slots.slot).to(self._device),
            root=norm_of(norms).sqrt()[:, None].to(self._device),
            means=(left, right),
            values=(inputs, outputs, along),
            scales=scales,
            widths=tuple(torch.exp2(indices.float() / OCTAVE) for indices in scales),
            strength=self._factors(head.strengths[slots.kind]),
            boost=self._factors(head.boosts[slots.kind]),
            boosted=known.float()[:, None].to(self._device),
        )

    def _modules(self, part: _Part) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        kind, layer = part.integers.slots.kind, torch.from_numpy(part.integers.slots.layer)
        inputs, outputs, along = (
            self._rounded(values, scales) * self._step for values, scales in zip(part.values, part.scales, strict=True)
        )
        # As `TokenQuantizer.dequantise`, then A = inputs / sqrt(s), B = outputs / sqrt(s), and channel weights undone.
        inputs = inputs * torch.exp2(part.boosted * part.boost[part.slot][:, None])
        inputs = inputs + self._subspace.expand(kind, layer, along, inputs.shape[1])
        inputs, outputs = (
            (values + mean) / part.root for values, mean in zip((inputs, outputs), part.means, strict=True)
        )
        for number, first, end in part.modules:
            a = inputs[first:end] * torch.exp2(-self._weights.inputs[kind][number])
            b = outputs[first:end] * torch.exp2(part.strength[number] - self._weights.outputs[kind][number])
            yield self._codec.config.kinds[kind].module(number), (a, b.T)

    def _rounded(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Round as the codec does, with a straight-through gradient (Bengio et al., arXiv 1308.3432)."""
        return self._centred(values.detach().round().clamp(-LIMIT, LIMIT), scales) + (values - values.detach())

    def _centred(self, whole: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the mean of each integer's bin: `icmlora.generator.quantizer.centred`, on the device."""
        table, starts = self._centres
        places = (whole != 0).flatten().nonzero().squeeze(1)
        found = whole.flatten()[places]
        indices = scales.flatten()[places].int() - SMALLEST
        entries = starts[indices] + found.abs().int()
        is_listed = entries < starts[indices + 1]  # beyond, the mean is the middle of the bin
        centres = torch.where(is_listed, table[torch.where(is_listed, entries, 0)].copysign(found), found)
        return whole.flatten().index_copy(0, places, centres).view_as(whole)

    def _factors(self, stored: NDArray[np.int8]) -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(stored.astype(np.float32) / STRENGTHS).to(self._device))


def _stored(factors: torch.Tensor) -> NDArray[np.int8]:
    octaves = factors.detach().cpu().numpy()
    stored: NDArray[np.int8] = np.clip(np.rint(octaves * STRENGTHS), -127, 127).astype(np.int8)
    return stored


def _whole(values: torch.Tensor) -> Integers:
    return clip(np.rint(values.detach().cpu().double().numpy()))
