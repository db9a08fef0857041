"""A code whose integers are temporarily real numbers, so gradient steps can change them.

    code ──open──▶ values in steps, log2 strengths ──round, with a straight-through gradient──▶ factors of each module
                            │                                                                        (its function)
                            └──▶ bits under the coder's scales (its cost)
    rounded values ──close──▶ code of the same form

Values start from the adapter's exact values, not from the rounded ones. Slots that the code leaves out stay left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from icmlora.adapter.model import Adapter
from icmlora.base_models.running.lora_hooks import Factors
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.packing import KindIntegers
from icmlora.generator.codec.quantizer import norm_of
from icmlora.generator.files.entropy_coding import LIMIT
from icmlora.generator.initial_a.subspace import Bases, bases_of
from icmlora.generator.network.code_length import bin_bits
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import KindTokens, Slots
from icmlora.generator.scales import OCTAVE, SMALLEST, STRENGTHS, centre_table
from icmlora.io.devices import moved


class _Fixed(NamedTuple):
    """The constants of the n slots of one module kind."""

    layer: torch.Tensor  # int64, shape (n,)
    slot: torch.Tensor  # int64, shape (n,)
    root: torch.Tensor  # square roots of the norms, shape (n, 1)
    means: tuple[torch.Tensor, torch.Tensor]  # the generator's prediction, shapes (n, in) and (n, out)
    undone: tuple[torch.Tensor, torch.Tensor]  # factors that undo the channels' weights, shapes (n, in) and (n, out)
    bases: Bases | None  # of the initial subspace, None if unknown
    scales: tuple[torch.Tensor, ...]  # scale indices of the values, of the same shapes
    boosted: torch.Tensor  # 1 where a slot's module has an initial subspace, else 0; shape (n,)


@dataclass(frozen=True, eq=False)
class _Part:
    """One module kind of a code."""

    integers: KindIntegers
    modules: list[tuple[str, int]]  # names, each with its number of slots, in the order of the n slots
    # In quantiser steps from the prediction, shapes (n, in), (n, out) and, along the initial subspace, (n, R).
    values: tuple[nn.Parameter, nn.Parameter, nn.Parameter]
    strength: nn.Parameter  # log2 of the factor that each layer's dW is multiplied by, shape (L,)
    boost: nn.Parameter  # log2 of the factor for each rank slot's inputs across the initial subspace, shape (S,)
    fixed: _Fixed


class RelaxedCode:
    """The code of one adapter while an optimiser changes it on a device."""

    def __init__(self, codec: Codec, adapter: Adapter, code: bytes, device: torch.device | None = None) -> None:
        self._codec, self._opened = codec, codec.open(code)
        self._device = device = device or torch.device("cpu")
        table, starts = centre_table()
        self._centres = torch.from_numpy(table).to(device), torch.from_numpy(starts).to(device)
        self._step = 2.0 ** (self._opened.head.step / OCTAVE)
        tokens = {group.kind: group for group in tokenize(adapter, codec.config, codec.sensitivity)}
        with torch.no_grad():
            self._parts = [self._part(group, tokens[group.slots.kind]) for group in self._opened.groups]

    @property
    def step(self) -> int:
        """The quantiser step, log2 in eighths."""
        return self._opened.head.step

    @property
    def values(self) -> list[nn.Parameter]:
        """The parameters that are rounded to integers."""
        return [values for part in self._parts for values in part.values]

    @property
    def strengths(self) -> list[nn.Parameter]:
        """The parameters that scale modules, and their inputs across the initial subspace; in octaves."""
        return [factor for part in self._parts for factor in (part.strength, part.boost)]

    @torch.no_grad()
    def continue_from(self, other: RelaxedCode, *, reset_zeros: bool) -> None:
        """Copy the values of the same adapter's code at another step, in the slots that both have.

        If `reset_zeros`, values that the other code rounds to zero are not copied: changes by the optimiser had no
        effect there, but would have at a finer step. Strengths are changed by as much as the other code's have changed
        since it was opened: the loss that they compensate for depends on the step.
        """
        ratio = other._step / self._step
        theirs = {part.integers.slots.kind: part for part in other._parts}
        for part in self._parts:
            before = theirs.get(part.integers.slots.kind)
            if before is None:
                continue
            mine, others = (self._places(one.integers.slots) for one in (part, before))
            _, *rows = np.intersect1d(mine, others, assume_unique=True, return_indices=True)
            here, there = (torch.from_numpy(row).to(self._device) for row in rows)
            for values, earlier in zip(part.values, before.values, strict=True):
                fitted = earlier[there]
                if reset_zeros:
                    fitted = torch.where(fitted.round() == 0, values[here] / ratio, fitted)
                values[here] = fitted * ratio
            began = _octaves(other._opened.head.strengths[part.integers.slots.kind]).to(self._device)
            part.strength.add_(before.strength - began)
            part.boost.copy_(before.boost)

    def factors(self, dtype: torch.dtype = torch.float32) -> Factors:
        """Return the factors that the rounded code decodes to, A (r, in) and B (out, r), with gradients."""
        return dict(factors for part in self._parts for factors in self._modules(part, dtype))

    def bits(self) -> torch.Tensor:
        """Return the bits of the values under the coder's tables, a scalar; values need not be integers."""
        # This takes several times as much memory as the values: part by part on a CPU, in fewer calls on a card.
        size = 1 if self._device.type == "cpu" else max(1, len(self._parts))
        groups = (self._parts[start : start + size] for start in range(0, len(self._parts), size))
        return sum(map(_bits, groups), torch.zeros((), device=self._device))

    def to_code(self) -> bytes:
        """Round all parameters and write the code."""
        strengths, boosts = self._opened.head.strengths.copy(), self._opened.head.boosts.copy()
        groups = []
        for part in self._parts:
            slots, subspace = part.integers.slots, self._opened.state.subspace
            steps = [values.detach().cpu() for values in part.values]
            vectors = self._codec.quantizer.rounded(slots, part.integers.norms, subspace, self._opened.head.step, steps)
            groups.append(replace(part.integers, vectors=vectors))
            kind, layers = slots.kind, np.unique(slots.layer)
            strengths[kind, layers] = _stored(part.strength)[layers]
            boosts[kind] = _stored(part.boost)
        head = replace(self._opened.head, strengths=strengths, boosts=boosts)
        return self._codec.close(head, groups)

    def _part(self, integers: KindIntegers, tokens: KindTokens) -> _Part:
        codec, head, state = self._codec, self._opened.head, self._opened.state
        quantizer, slots, kind = codec.quantizer, integers.slots, integers.slots.kind
        # The tokens of the slots that the code has, in its order.
        kept = tokens[torch.from_numpy(np.isin(self._places(tokens.slots), self._places(slots)))]
        norms = integers.norms
        values = quantizer.in_steps(kept, norms, state, head.step)
        layer, slot = torch.from_numpy(slots.layer), torch.from_numpy(slots.slot)
        undone = codec.sensitivity.inverse(kind, layer.device)
        bases = bases_of([(state.subspace, kind, layer, slot)], undone[0].shape[1]) if len(layer) else None
        layers, counts = np.unique(slots.layer, return_counts=True)  # layers are ascending
        fixed = _Fixed(
            layer=layer,
            slot=slot,
            root=norm_of(norms).sqrt()[:, None],
            means=quantizer.means(slots, norms, state),
            undone=(undone[0][layer], undone[1][layer]),
            bases=bases,
            scales=tuple(
                torch.from_numpy(indices) for indices in quantizer.scales(slots, norms, state.subspace, head.step)
            ),
            boosted=torch.from_numpy(state.subspace.knows(kind)[slots.layer]).float(),
        )
        inputs, outputs, along = (nn.Parameter(side.float().to(self._device)) for side in values)
        return _Part(
            integers=integers,
            modules=[
                (codec.config.kinds[kind].module(number), count)
                for number, count in zip(layers.tolist(), counts.tolist(), strict=True)
            ],
            values=(inputs, outputs, along),
            strength=nn.Parameter(_octaves(head.strengths[kind]).to(self._device)),
            boost=nn.Parameter(_octaves(head.boosts[kind]).to(self._device)),
            fixed=moved(fixed, self._device),
        )

    def _places(self, slots: Slots) -> NDArray[np.int64]:
        """Return a number for each slot of a kind, shape (n,)."""
        return slots.layer * self._codec.config.slots + slots.slot

    def _modules(self, part: _Part, dtype: torch.dtype) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        # Rounded as by the codec, with a straight-through gradient (Bengio et al., arXiv 1308.3432).
        inputs, outputs, along = (
            (self._centred(values.detach().round().clamp(-LIMIT, LIMIT), scales) + (values - values.detach()))
            * self._step
            for values, scales in zip(part.values, part.fixed.scales, strict=True)
        )
        # As `TokenQuantizer.dequantise`, then A = inputs / sqrt(s), B = outputs / sqrt(s), and channel weights undone.
        fixed = part.fixed
        inputs = inputs * torch.exp2(fixed.boosted * part.boost[fixed.slot])[:, None]
        if fixed.bases is not None:
            inputs = inputs + fixed.bases.expand(along)
        inputs, outputs = (
            (values + mean) / fixed.root for values, mean in zip((inputs, outputs), fixed.means, strict=True)
        )
        inputs_undone, outputs_undone = fixed.undone
        inputs = (inputs * inputs_undone).to(dtype)
        outputs = (outputs * torch.exp2(part.strength[fixed.layer])[:, None] * outputs_undone).to(dtype)
        counts = [count for _, count in part.modules]
        for (name, _), a, b in zip(
            part.modules, torch.split(inputs, counts), torch.split(outputs, counts), strict=True
        ):
            yield name, (a, b.T)

    def _centred(self, whole: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the mean of each integer's bin: `icmlora.generator.codec.quantizer.centred`, on the device."""
        if whole.device.type != "cpu":
            return self._looked_up(whole, scales)
        places = (whole != 0).flatten().nonzero().squeeze(1)  # few are nonzero; but a card would have to wait for them
        found = self._looked_up(whole.flatten()[places], scales.flatten()[places])
        return whole.flatten().index_copy(0, places, found).view_as(whole)

    def _looked_up(self, whole: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        table, starts = self._centres
        indices = scales.int() - SMALLEST
        entries = starts[indices] + whole.abs().int()
        is_listed = entries < starts[indices + 1]  # beyond, the mean is the middle of the bin
        return torch.where(is_listed, table[torch.where(is_listed, entries, 0)].copysign(whole), whole)


def _bits(parts: Sequence[_Part]) -> torch.Tensor:
    scales = torch.cat([indices.flatten() for part in parts for indices in part.fixed.scales])
    # The scales take as much memory as the values, so they are recomputed.
    widths = scales.float().div_(OCTAVE).exp2_()
    return bin_bits(torch.cat([values.flatten() for part in parts for values in part.values]), widths).sum()


def _octaves(stored: NDArray[np.int8]) -> torch.Tensor:
    return torch.from_numpy(stored.astype(np.float32) / STRENGTHS)


def _stored(factors: torch.Tensor) -> NDArray[np.int8]:
    octaves = factors.detach().cpu().numpy()
    stored: NDArray[np.int8] = np.clip(np.rint(octaves * STRENGTHS), -127, 127).astype(np.int8)
    return stored
