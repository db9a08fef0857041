"""Tokens -> integers at one quantiser step, and how far what they decode to is from the tokens.

    tokens of a kind ──some layers at a time──▶ integers ──▶ rebuilt tokens ──▶ inner products ──▶ strength, errors

Some layers fit into the processor's cache. A whole kind of a large adapter does not, and takes several times as long.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from icmlora.adapter.metrics import relative
from icmlora.generator.code import CodeHead
from icmlora.generator.codec import Codec
from icmlora.generator.container import ABSENT
from icmlora.generator.cvae import TaskState
from icmlora.generator.objective import worth_writing
from icmlora.generator.packing import KindIntegers, written_slots
from icmlora.generator.quantizer import Means, Slots, norm_of
from icmlora.generator.scales import STRENGTHS
from icmlora.generator.sensitivity import Sensitivity
from icmlora.generator.tokens import KindTokens, slot_overlaps, squared_norm
from icmlora.io.threads import side_by_side

_Parts = list[tuple[float, float]]  # squared error and squared norm of each module
_Products = list[tuple[float, float, float]]  # |dW|^2, <dW, dW'> and |dW'|^2 of each module

_AT_A_TIME = 1 << 19  # values that are rounded together: 2 MB
_WORTH_A_THREAD = 1 << 16  # inputs of a kind on average: of fewer, threads wait for each other longer than they work
_STRONGEST = STRENGTHS  # a code is made at most twice as strong


@dataclass(frozen=True)
class Rounded:
    """The integers of an adapter at one step, and the squared errors of what they decode to."""

    head: CodeHead
    groups: Sequence[KindIntegers]  # some layers of a kind each, in their order
    squared_error: float  # of dW; the same as `weighted_error` if it was not asked for
    weighted_error: float


class Rounding:
    """The tokens of an adapter, to be rounded at one step after the other."""

    def __init__(
        self,
        codec: Codec,
        tokens: Sequence[KindTokens],
        state: TaskState,
        head: CodeHead,
        *,
        keeps_means: bool,
        is_plain_wanted: bool,
    ) -> None:
        """Take tokens, what their code's head says at every step, and whether errors of plain dW are wanted.

        Predictions are the same at every step. They may be kept, which takes as much memory as the tokens.
        """
        self._codec, self.tokens, self._state, self._head = codec, tokens, state, head
        self._keeps_means, self._is_plain_wanted = keeps_means, is_plain_wanted
        self._means: defaultdict[int, list[Means]] = defaultdict(list)  # of each kind, some layers at a time

    def at(self, step: int) -> Rounded:
        """Round at one step (log2, in eighths): several kinds at a time, if they are large."""
        is_small = sum(group.inputs.numel() for group in self.tokens) < _WORTH_A_THREAD * len(self.tokens)
        with side_by_side(1 if is_small else None) as each:
            found = list(each(lambda group: self._kind(group, step), self.tokens))
        head = replace(
            self._head,
            step=step,
            gains=np.zeros_like(self._head.gains),
            strengths=np.zeros_like(self._head.strengths),
            kept=np.where(self._head.kept == ABSENT, ABSENT, 0).astype(self._head.kept.dtype),
        )
        for parts, strength, _, _ in found:
            for part in parts:
                kind, layers = part.slots.kind, part.slots.layer
                head.gains[kind] = part.gain
                head.strengths[kind, np.unique(layers)] = strength
                np.add.at(head.kept[kind], layers, 1)
        plain = relative(part for one in found for part in one[2])
        heavy = relative(part for one in found for part in one[3])
        return Rounded(head, [part for one in found for part in one[0]], plain, heavy)

    def _kind(self, group: KindTokens, step: int) -> tuple[list[KindIntegers], int, _Parts, _Parts]:
        """Round one kind, some layers at a time; returns its strength, and its modules' errors, plain and weighted."""
        quantizer, sensitivity = self._codec.quantizer, self._codec.sensitivity
        gain, _ = quantizer.norm_residuals(slots_of(group), group.norm)
        parts, overlaps = [], []
        plain, heavy = _Products(), _Products()
        for number, tokens in enumerate(group.by_layers(_AT_A_TIME)):
            means = self._means_of(tokens, gain, number)
            integers, keep, rebuilt = quantised(self._codec, tokens, self._state, step, gain, means)
            parts.append(integers)
            rebuilt.outputs.mul_(keep[:, None])
            overlaps.append(slot_overlaps(tokens, rebuilt))
            heavy += _products(tokens, rebuilt)
            if self._is_plain_wanted:
                plain += _products(tokens, rebuilt, sensitivity)
        strength = strength_of(group, torch.cat(overlaps))
        errors = [_errors(products, 2.0 ** (strength / STRENGTHS)) for products in (plain or heavy, heavy)]
        return parts, strength, errors[0], errors[1]

    def _means_of(self, tokens: KindTokens, gain: int, number: int) -> Means:
        """Return the predictions of some layers, the `number`th of their kind."""
        known = self._means[tokens.kind]
        if number < len(known):
            return known[number]
        quantizer, slots = self._codec.quantizer, slots_of(tokens)
        norms = quantizer.norms(slots, *quantizer.norm_residuals(slots, tokens.norm, gain))
        means = quantizer.means(slots, norms, self._state)
        if self._keeps_means:
            known.append(means)
        return means


def slots_of(group: KindTokens) -> Slots:
    """Return the slots of tokens (n, in) and (n, out)."""
    return Slots(group.kind, group.layer.numpy(), group.slot.numpy())


def quantised(
    codec: Codec, group: KindTokens, state: TaskState, step: int, gain: int, means: Means | None = None
) -> tuple[KindIntegers, torch.Tensor, KindTokens]:
    """Round the tokens of one kind, (n, in) and (n, out), and leave out the slots that are not worth their bits.

    Step and gain are log2 in eighths; norms are counted from the gain. `means` are predictions that are known already.
    Returns the integers of the slots that are kept, a mask (n,) of these, and what the integers of all slots decode to.
    """
    quantizer, slots = codec.quantizer, slots_of(group)
    _, residuals = quantizer.norm_residuals(slots, group.norm, gain)
    norms = quantizer.norms(slots, gain, residuals)
    means = means or quantizer.means(slots, norms, state)
    found = quantizer.quantise(group, norms, state, step, means)
    vectors = quantizer.dequantise(slots, norms, state, step, found, means=means)
    rebuilt = KindTokens(group.kind, group.layer, group.slot, norm_of(norms), *vectors)
    inputs, outputs, along = np.bincount(found.sides, minlength=3 * len(norms)).reshape(3, len(norms)) > 0
    is_worth = worth_writing(group, rebuilt, torch.from_numpy(inputs | along), torch.from_numpy(outputs))  # (n,)
    keep = written_slots(slots, is_worth.numpy())
    if not keep.all():
        sizes = (*quantizer.sizes[group.kind], state.subspace.rows(group.kind))
        slots, residuals, found = slots[keep], residuals[keep], found.kept(keep, sizes)
    return KindIntegers(slots, gain, residuals, found), torch.from_numpy(keep), rebuilt


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


def _products(original: KindTokens, rebuilt: KindTokens, sensitivity: Sensitivity | None = None) -> _Products:
    """Return the inner products of each layer's module; of plain dW, if the weights of its channels are given."""
    a, b = _by_module(original, sensitivity)
    c, d = _by_module(rebuilt, sensitivity)
    products = [
        ((left @ right.mT) * (left_b @ right_b.mT)).sum(dim=(1, 2)).tolist()
        for left, left_b, right, right_b in ((a, b, a, b), (a, b, c, d), (c, d, c, d))
    ]
    return list(zip(*products, strict=True))


def _by_module(group: KindTokens, sensitivity: Sensitivity | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B^T of each layer's module in float64, (modules, r, in) and (modules, r, out), filled with zeros."""
    a, b = group.inputs.double().div_(group.norm[:, None]), group.outputs.double()
    if sensitivity is not None:
        sensitivity.unweigh(group.kind, group.layer, a, b)
    counts = torch.unique_consecutive(group.layer, return_counts=True)[1].tolist()
    if len(set(counts)) == 1:
        return a.view(len(counts), -1, a.shape[1]), b.view(len(counts), -1, b.shape[1])
    padded = [pad_sequence(list(torch.split(values, counts)), batch_first=True) for values in (a, b)]
    return padded[0], padded[1]


def _errors(products: _Products, factor: float) -> _Parts:
    """Return squared error and squared norm of each module, if dW' is multiplied by a factor."""
    return [(max(own - 2 * factor * both + factor**2 * other, 0.0), own) for own, both, other in products]
