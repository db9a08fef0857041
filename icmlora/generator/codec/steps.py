"""An adapter at any quantiser step: its integers, and the errors of the decoded tokens.

    tokens of a kind ──some layers at a time──▶ integers ──▶ rebuilt tokens ──▶ inner products ──▶ strength, errors

A few layers fit into the processor's cache. A whole kind of a large adapter does not, and takes several times as long.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from icmlora.adapter.metrics import relative
from icmlora.adapter.model import Adapter
from icmlora.generator.codec.code import CodeHead
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.limits import Limits
from icmlora.generator.codec.packing import KindIntegers, written_slots
from icmlora.generator.codec.quantizer import Means, log2_norms, norm_of
from icmlora.generator.files.container import ABSENT
from icmlora.generator.initial_a.draw import InitialA
from icmlora.generator.network.cvae import TaskState
from icmlora.generator.network.objective import worth_writing
from icmlora.generator.network.stack import stacked
from icmlora.generator.network.tokenizing import tokenize
from icmlora.generator.network.tokens import KindTokens, refuse_overflow, refuse_underflow, squared_norm
from icmlora.generator.network.water_filling import WaterFilling
from icmlora.generator.scales import OCTAVE, STRENGTHS
from icmlora.generator.sensitivity import Sensitivity
from icmlora.io.threads import one_thread, side_by_side

_Errors = list[tuple[float, float]]  # squared error and squared norm of some modules each
_Stacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # shapes (modules, r, in), (modules, r, out), (modules, r)

_SMALL = 1 << 22  # parameters; up to here the predictions of all kinds stay in memory
_PART = 8  # every eighth module of a larger adapter is enough to estimate the coarsest step
_AT_A_TIME = 1 << 20  # values rounded together: 4 MB
_WORTH_A_THREAD = 1 << 16  # mean input values per kind: with fewer, threads wait for each other longer than they work
_MAX_STRENGTH = STRENGTHS  # a code is made at most twice as strong
_WEAK = 0.25  # a slot is weak if its values have a smaller root mean square, in steps (docs/results/LOG.md)


@dataclass(frozen=True)
class Rounded:
    """The integers of an adapter at one step, and the squared errors of its decoded dW."""

    head: CodeHead
    groups: Sequence[KindIntegers]  # some layers of a kind each, in their order
    squared_error: float  # of dW; the same as `weighted_error` if it was not requested
    weighted_error: float


@dataclass(frozen=True)
class SlotChoice:
    """Which slots a code has, and how its strengths compensate for rounding."""

    # Slots whose values are small compared with the step, so most of their integers are 0. They bring |dW| nearer to
    # the original, but improve the adapter's function only a little.
    keep_weak: bool
    # Whether the decoded dW is as long as the original along its strong slots, which lose less to rounding.
    energy_weighted: bool


class AdapterSteps:
    """The codes of one adapter at any quantiser step, log2 in eighths."""

    @torch.no_grad()
    def __init__(
        self,
        codec: Codec,
        adapter: Adapter,
        vectors: Mapping[str, torch.Tensor],
        initial: InitialA | None,
        *,
        is_plain_wanted: bool = False,
        is_exact: bool = False,
    ) -> None:
        """Prepare an adapter, with its task vectors (size,) and the place where its initial A was drawn.

        Errors of plain dW are optional. Errors are accurate to 1e-6, or exact in twice the time.
        """
        config = codec.config
        tokens = tokenize(adapter, config, codec.sensitivity)
        refuse_overflow(tokens, config)
        refuse_underflow(tokens)
        with one_thread():
            condition, subspace = codec.condition(vectors), codec.subspace(initial)
            (latent,) = codec.net.posterior(stacked([tokens], by_kind=True), condition[None])
            state = TaskState(condition, latent.round().clamp(-127, 127), subspace)
            state = replace(state, subspace=replace(subspace, shifts=codec.quantizer.shifts(tokens, state)))
        shape = len(config.kinds), config.layers  # (K, L)
        self._head = CodeHead(  # the part that is the same at every step
            step=0,
            condition=state.condition.numpy().astype(np.int8),
            latent=state.latent.numpy().astype(np.int8),
            gains=np.zeros(shape[0], dtype=np.int16),
            strengths=np.zeros(shape, dtype=np.int8),
            kept=np.full(shape, ABSENT, dtype=np.uint16),
            shifts=state.subspace.shifts,
            boosts=state.subspace.boosts,
            initial=initial,
            task_type=adapter.task_type,
        )
        for module in adapter.layout:
            self._head.kept[config.place_of(module)] = 0
        self._codec, self._state, self._is_plain_wanted = codec, state, is_plain_wanted
        self._dtype = torch.float64 if is_exact else torch.float32
        self.is_small = sum(module.parameters for module in adapter.layout) <= _SMALL
        # Predictions are the same at every step; for a small adapter they are cached, some layers of a kind at a time.
        self._means: defaultdict[int, list[Means]] = defaultdict(list)
        self._tokens: Sequence[KindTokens] = tokens
        self.theory = WaterFilling(tokens, codec.sensitivity, state.subspace)

    def sample(self) -> AdapterSteps:
        """Return the same for every eighth module, kind by kind."""
        layers = [torch.unique_consecutive(group.layer) for group in self._tokens]
        chosen = torch.arange(sum(map(len, layers))) % _PART == _PART // 2
        parts = []
        for group, found, is_chosen in zip(
            self._tokens, layers, torch.split(chosen, list(map(len, layers))), strict=True
        ):
            if is_chosen.any():
                parts.append(group[torch.isin(group.layer, found[is_chosen])])
        part = copy.copy(self)
        part._tokens, part._means, part.is_small = parts or self._tokens, defaultdict(list), True
        part.theory = WaterFilling(part._tokens, self._codec.sensitivity, self._state.subspace)
        return part

    def expected(self, tolerance: float) -> int:
        """Return the step at which theory expects a weighted squared error."""
        return math.floor(Limits(tolerance=tolerance).expected_step(self.theory))

    def at(self, step: int) -> Rounded:
        """Round at one step."""
        return self._rounded(self._tokens, step)

    @torch.no_grad()
    def code(self, step: int) -> tuple[bytes, float]:
        """Return the code at a step, and its weighted squared error."""
        found = self.at(step)
        return self._codec.close(found.head, found.groups), found.weighted_error

    @torch.no_grad()
    def with_slots(self, step: int, slots: SlotChoice) -> bytes:
        """Return the code at a step with the chosen slots."""
        groups = self._tokens
        if not slots.keep_weak:
            least = _WEAK * 2.0 ** (step / OCTAVE)
            stronger = (group[group.root_mean_square() >= least] for group in groups)
            groups = [group for group in stronger if len(group.norm)]
        found = self._rounded(groups, step, slots)
        return self._codec.close(found.head, found.groups)

    def _rounded(self, tokens: Sequence[KindTokens], step: int, slots: SlotChoice | None = None) -> Rounded:
        """Round tokens at one step, large kinds in parallel."""
        is_small = sum(group.inputs.numel() for group in tokens) < _WORTH_A_THREAD * len(tokens)
        with side_by_side(1 if is_small else None) as each:
            found = list(each(lambda group: self._rounded_kind(group, step, slots), tokens))
        head = replace(
            self._head,
            step=step,
            gains=np.zeros_like(self._head.gains),
            strengths=np.zeros_like(self._head.strengths),
            shifts=self._head.shifts.copy(),
            kept=np.where(self._head.kept == ABSENT, ABSENT, 0).astype(self._head.kept.dtype),
        )
        for group in tokens:
            head.gains[group.kind] = self._codec.quantizer.gain(group.slots, log2_norms(group.norm))
        for parts, strength, _, _ in found:
            for part in parts:
                kind, layers = part.slots.kind, part.slots.layer
                head.strengths[kind, np.unique(layers)] = strength
                np.add.at(head.kept[kind], layers, 1)
        most = np.where(head.kept == ABSENT, 0, head.kept).max(axis=1)  # of any layer, (K,)
        head.shifts[np.arange(head.shifts.shape[1]) >= most[:, None]] = 0  # no slot is coded under them
        plain = relative(error for *_, errors, _ in found for error in errors)
        weighted = relative(error for *_, errors in found for error in errors)
        return Rounded(head, [part for parts, *_ in found for part in parts], plain, weighted)

    def _rounded_kind(
        self, group: KindTokens, step: int, choice: SlotChoice | None
    ) -> tuple[list[KindIntegers], int, _Errors, _Errors]:
        """Round one kind, some layers at a time; return its integers, its strength, and plain and weighted errors."""
        quantizer, state = self._codec.quantizer, self._state
        known = self._means[group.kind] if choice is None else []
        parts, overlaps = [], []
        # |dW|^2, <dW, dW'> and |dW'|^2 of some modules.
        plain, weighted = list[tuple[float, float, float]](), list[tuple[float, float, float]]()
        for number, tokens in enumerate(group.by_layers(_AT_A_TIME)):
            slots, norms = tokens.slots, log2_norms(tokens.norm)
            means = known[number] if number < len(known) else quantizer.means(slots, norms, state)
            if self.is_small and number == len(known):
                known.append(means)
            vectors = quantizer.quantise(tokens, norms, state, step, means)
            values = quantizer.dequantise(slots, norms, state, step, vectors, means=means)
            rebuilt = KindTokens(tokens.kind, tokens.layer, tokens.slot, norm_of(norms), *values)
            # Slots that are not worth their bits are dropped.
            inputs, outputs, along = np.bincount(vectors.sides, minlength=3 * len(norms)).reshape(3, len(norms)) > 0
            has_both = (inputs | along) & outputs
            is_worth, unsure = torch.from_numpy(has_both), torch.from_numpy(np.flatnonzero(~has_both))
            if len(unsure):  # the others need no sums over their values
                neither = torch.zeros(len(unsure), dtype=torch.bool)
                is_worth[unsure] = worth_writing(tokens[unsure], rebuilt[unsure], neither, neither)
            keep = written_slots(slots, is_worth.numpy())
            if not keep.all():
                sizes = (*quantizer.sizes[group.kind], state.subspace.rows(group.kind))
                slots, norms, vectors = slots[keep], norms[keep], vectors.kept(keep, sizes)
            parts.append(KindIntegers(slots, norms, vectors))
            rebuilt.outputs[~torch.from_numpy(keep)] = 0
            left, right = (_by_module(one, self._dtype) for one in (tokens, rebuilt))
            both = _products(left, right)
            overlaps.append(both.diagonal(dim1=1, dim2=2)[left[2] > 0])
            # Slots of the original are orthogonal.
            weighted.append((squared_norm([tokens]), float(both.sum()), float(_products(right, right).sum())))
            if self._is_plain_wanted:
                left, right = (_by_module(one, self._dtype, self._codec.sensitivity) for one in (tokens, rebuilt))
                own, shared, other = (_products(*pair) for pair in ((left, left), (left, right), (right, right)))
                plain.append((float(own.sum()), float(shared.sum()), float(other.sum())))
        strength = _strength_of(
            group, torch.cat(overlaps), energy_weighted=choice is not None and choice.energy_weighted
        )
        factor = 2.0 ** (strength / STRENGTHS)
        plain_errors, weighted_errors = (
            [(max(own - 2 * factor * both + factor**2 * other, 0.0), own) for own, both, other in products]
            for products in (plain or weighted, weighted)
        )
        return parts, strength, plain_errors, weighted_errors


def _strength_of(original: KindTokens, overlaps: torch.Tensor, *, energy_weighted: bool) -> int:
    """Return log2, in 64ths, of the factor that makes a kind's decoded dW as long as the original, along it.

    `overlaps` are the inner products of original and decoded slots, 0 for slots that are left out. With
    `energy_weighted`, a slot counts by the square of its energy, not by its energy.
    """
    # Values that round to zero make the decoded dW shorter. An adapter at nine tenths of its strength loses more gain
    # than the larger error at full strength costs. But where much of dW is in weak slots, which lose most, compensating
    # for them makes strong slots too strong (docs/results/LOG.md).
    energy, along = original.norm.double().square(), overlaps.double()
    if energy_weighted:
        energy, along = energy.square(), along * energy
    ratio = float(energy.sum() / along.sum())
    if not 0 < ratio < math.inf:  # products of very large values overflow float32
        return 0
    return min(max(round(STRENGTHS * math.log2(ratio)), 0), _MAX_STRENGTH)


def _products(left: _Stacked, right: _Stacked) -> torch.Tensor:
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
