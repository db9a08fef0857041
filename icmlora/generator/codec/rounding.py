"""Tokens -> integers at one quantiser step, and the errors of the decoded tokens.

    tokens of a kind ──some layers at a time──▶ integers ──▶ rebuilt tokens ──▶ inner products ──▶ strength, errors

A few layers fit into the processor's cache. A whole kind of a large adapter does not, and takes several times as long.
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
from icmlora.generator.codec.code import CodeHead
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.packing import KindIntegers, written_slots
from icmlora.generator.codec.quantizer import Means, Slots, norm_of
from icmlora.generator.files.container import ABSENT
from icmlora.generator.network.cvae import TaskState
from icmlora.generator.network.objective import worth_writing
from icmlora.generator.network.tokens import KindTokens, squared_norm
from icmlora.generator.scales import STRENGTHS
from icmlora.generator.sensitivity import Sensitivity
from icmlora.io.threads import side_by_side

_Parts = list[tuple[float, float]]  # squared error and squared norm of some modules each
_Stacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # shapes (modules, r, in), (modules, r, out), (modules, r)
_Products = tuple[float, float, float]  # |dW|^2, <dW, dW'> and |dW'|^2 of some modules

_AT_A_TIME = 1 << 20  # values rounded together: 4 MB
_WORTH_A_THREAD = 1 << 16  # mean input values per kind: with fewer, threads wait for each other longer than they work
_MAX_STRENGTH = STRENGTHS  # a code is made at most twice as strong


@dataclass(frozen=True)
class Rounded:
    """The integers of an adapter at one step, and the squared errors of its decoded dW."""

    head: CodeHead
    groups: Sequence[KindIntegers]  # some layers of a kind each, in their order
    squared_error: float  # of dW; the same as `weighted_error` if it was not requested
    weighted_error: float


class Rounding:
    """Rounds the tokens of an adapter at one step after another."""

    def __init__(
        self,
        codec: Codec,
        tokens: Sequence[KindTokens],
        state: TaskState,
        head: CodeHead,
        *,
        keeps_means: bool,
        is_plain_wanted: bool,
        is_exact: bool,
        for_strong: bool = False,
    ) -> None:
        """Store tokens, the part of their code's head that is the same at every step, and options.

        Predictions are the same at every step; `keeps_means` caches them, in as much memory as the tokens take. Errors
        of plain dW are optional. Errors are accurate to 1e-6, or exact in twice the time. The decoded dW is as long as
        the original, or with `for_strong` as long along its strong slots, which lose less to rounding.
        """
        self._codec, self.tokens, self._state, self._head = codec, tokens, state, head
        self._keeps_means, self._is_plain_wanted = keeps_means, is_plain_wanted
        self._dtype = torch.float64 if is_exact else torch.float32
        self._for_strong = for_strong
        self._means: defaultdict[int, list[Means]] = defaultdict(list)  # of each kind, some layers at a time

    def at(self, step: int) -> Rounded:
        """Round at one step (log2, in eighths), large kinds in parallel."""
        is_small = sum(group.inputs.numel() for group in self.tokens) < _WORTH_A_THREAD * len(self.tokens)
        with side_by_side(1 if is_small else None) as each:
            found = list(each(lambda group: self._kind(group, step), self.tokens))
        head = replace(
            self._head,
            step=step,
            gains=np.zeros_like(self._head.gains),
            strengths=np.zeros_like(self._head.strengths),
            shifts=self._head.shifts.copy(),
            kept=np.where(self._head.kept == ABSENT, ABSENT, 0).astype(self._head.kept.dtype),
        )
        for parts, strength, _, _ in found:
            for part in parts:
                kind, layers = part.slots.kind, part.slots.layer
                head.gains[kind] = part.gain
                head.strengths[kind, np.unique(layers)] = strength
                np.add.at(head.kept[kind], layers, 1)
        most = np.where(head.kept == ABSENT, 0, head.kept).max(axis=1)  # of any layer, (K,)
        head.shifts[np.arange(head.shifts.shape[1]) >= most[:, None]] = 0  # no slot is coded under them
        plain = relative(part for one in found for part in one[2])
        heavy = relative(part for one in found for part in one[3])
        return Rounded(head, [part for one in found for part in one[0]], plain, heavy)

    def _kind(self, group: KindTokens, step: int) -> tuple[list[KindIntegers], int, _Parts, _Parts]:
        """Round one kind, some layers at a time; returns its integers, its strength, and plain and weighted errors."""
        quantizer, sensitivity = self._codec.quantizer, self._codec.sensitivity
        gain, _ = quantizer.norm_residuals(slots_of(group), group.norm)
        parts, overlaps = [], []
        plain: list[_Products] = []
        heavy: list[_Products] = []
        for number, tokens in enumerate(group.by_layers(_AT_A_TIME)):
            means = self._means_of(tokens, gain, number)
            integers, keep, rebuilt = quantised(self._codec, tokens, self._state, step, gain, means)
            parts.append(integers)
            rebuilt.outputs[~keep] = 0
            along, products = _products(tokens, rebuilt, self._dtype)
            overlaps.append(along)
            heavy.append(products)
            if self._is_plain_wanted:
                plain.append(_plain_products(tokens, rebuilt, self._dtype, sensitivity))
        strength = strength_of(group, torch.cat(overlaps), for_strong=self._for_strong)
        errors = [_errors(products, 2.0 ** (strength / STRENGTHS)) for products in (plain or heavy, heavy)]
        return parts, strength, errors[0], errors[1]

    def _means_of(self, tokens: KindTokens, gain: int, number: int) -> Means:
        """Return the predictions of some layers, the `number`th part of their kind."""
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
    codec: Codec, group: KindTokens, state: TaskState, step: int, gain: int, means: Means
) -> tuple[KindIntegers, torch.Tensor, KindTokens]:
    """Round the tokens of one kind, (n, in) and (n, out), and drop the slots that are not worth their bits.

    Step and gain are log2 in eighths; norms are counted from the gain. `means` are the predictions.
    Returns the integers of the kept slots, a mask (n,) of these slots, and the decoded tokens of all slots.
    """
    quantizer, slots = codec.quantizer, slots_of(group)
    _, residuals = quantizer.norm_residuals(slots, group.norm, gain)
    norms = quantizer.norms(slots, gain, residuals)
    found = quantizer.quantise(group, norms, state, step, means)
    vectors = quantizer.dequantise(slots, norms, state, step, found, means=means)
    rebuilt = KindTokens(group.kind, group.layer, group.slot, norm_of(norms), *vectors)
    inputs, outputs, along = np.bincount(found.sides, minlength=3 * len(norms)).reshape(3, len(norms)) > 0
    has_both = (inputs | along) & outputs
    is_worth, unsure = torch.from_numpy(has_both), torch.from_numpy(np.flatnonzero(~has_both))
    if len(unsure):  # the others need no sums over their values
        neither = torch.zeros(len(unsure), dtype=torch.bool)
        is_worth[unsure] = worth_writing(group[unsure], rebuilt[unsure], neither, neither)
    keep = written_slots(slots, is_worth.numpy())
    if not keep.all():
        sizes = (*quantizer.sizes[group.kind], state.subspace.rows(group.kind))
        slots, residuals, found = slots[keep], residuals[keep], found.kept(keep, sizes)
    return KindIntegers(slots, gain, residuals, found), torch.from_numpy(keep), rebuilt


def strength_of(original: KindTokens, overlaps: torch.Tensor, *, for_strong: bool = False) -> int:
    """Return log2, in 64ths, of the factor that makes a kind's decoded dW as long as the original, along it.

    Args:
        original: The tokens of the kind.
        overlaps: Inner products of original and decoded slots; 0 for slots that are left out.
        for_strong: Whether a slot counts by the square of its energy, not by its energy.
    """
    # Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more gain
    # than the larger error at full strength costs. But where much of dW is in weak slots, which lose most, compensating
    # for them makes strong slots too strong (docs/results/LOG.md).
    energy, along = original.norm.double().square(), overlaps.double()
    if for_strong:
        energy, along = energy.square(), along * energy
    ratio = float(energy.sum() / along.sum())
    if not 0 < ratio < math.inf:  # products of very large values overflow float32
        return 0
    return min(max(round(STRENGTHS * math.log2(ratio)), 0), _MAX_STRENGTH)


def _products(original: KindTokens, rebuilt: KindTokens, dtype: torch.dtype) -> tuple[torch.Tensor, _Products]:
    """Return the inner products of the slots, (n,), and of all modules."""
    left, right = _by_module(original, dtype), _by_module(rebuilt, dtype)
    both = _pairs(left, right)
    overlaps = both.diagonal(dim1=1, dim2=2)[left[2] > 0]
    # Slots of the original are orthogonal.
    return overlaps, (squared_norm([original]), float(both.sum()), float(_pairs(right, right).sum()))


def _plain_products(
    original: KindTokens, rebuilt: KindTokens, dtype: torch.dtype, sensitivity: Sensitivity
) -> _Products:
    """Return the inner products of plain dW, without the weights of its channels."""
    left, right = (_by_module(group, dtype, sensitivity) for group in (original, rebuilt))
    own, both, other = (float(_pairs(*pair).sum()) for pair in ((left, left), (left, right), (right, right)))
    return own, both, other


def _pairs(left: _Stacked, right: _Stacked) -> torch.Tensor:
    """Return the inner product of each pair of slots of a module in float64, (modules, r, r)."""
    (a, b, per_a), (c, d, per_c) = left, right
    return (a @ c.mT).double().mul_(b @ d.mT).mul_(per_a[:, :, None] * per_c[:, None])


def _by_module(group: KindTokens, dtype: torch.dtype, sensitivity: Sensitivity | None = None) -> _Stacked:
    """Return inputs, outputs and 1 / norms by module, padded with zeros; for plain dW if the weights are given."""
    inputs, outputs = group.inputs.to(dtype), group.outputs.to(dtype)
    if sensitivity is not None:
        inputs, outputs = inputs.clone(), outputs.clone()
        sensitivity.unweigh(group.kind, group.layer, inputs, outputs)
    counts = torch.unique_consecutive(group.layer, return_counts=True)[1].tolist()
    rows = inputs, outputs, group.norm.double().reciprocal()
    if len(set(counts)) == 1:
        a, b, per_norm = (values.view(len(counts), counts[0], *values.shape[1:]) for values in rows)
    else:
        a, b, per_norm = (pad_sequence(list(torch.split(values, counts)), batch_first=True) for values in rows)
    return a, b, per_norm


def _errors(products: list[_Products], factor: float) -> _Parts:
    """Return squared errors and squared norms, if dW' is multiplied by a factor."""
    return [(max(own - 2 * factor * both + factor**2 * other, 0.0), own) for own, both, other in products]
