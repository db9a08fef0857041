"""Code + residual -> adapter, and adapter + its code -> residual.

    code ──dequantise──▶ x_hat ──┐                               ┌──▶ slots of the code
    adapter ──tokens x───────────┴─ (x - x_hat) / finer step ────┤
                              `── slots that the code left out ──┴──▶ as a code codes them, at the finer step

The residual is measured from what the code decodes to, not from its integers. So it is right for a code of any origin,
also for one that was refined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError
from icmlora.generator.codec import Codec, OpenCode
from icmlora.generator.container import ABSENT
from icmlora.generator.encoding import Encoded, coarsest, compare
from icmlora.generator.entropy_coding import IntegerReader, Integers, IntegerWriter, Scales, clip
from icmlora.generator.limits import Limits
from icmlora.generator.packing import KindIntegers, read_kind, slots_between, split_sides, write_kind
from icmlora.generator.quantizer import Slots, centred
from icmlora.generator.residual import CLASSES, Residual, ResidualHead, digest_of
from icmlora.generator.rounding import quantised, strength_of
from icmlora.generator.scales import LARGEST, OCTAVE, SMALLEST
from icmlora.generator.stack import INPUTS, OUTPUTS
from icmlora.generator.tokenizing import tokenize
from icmlora.generator.tokens import KindTokens, slot_overlaps
from icmlora.generator.water_filling import WaterFilling
from icmlora.io.threads import one_thread

_WIDTH = OCTAVE // 2  # scale indices in one class: half an octave

_Classes = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # classes of a kind's integers, shapes (n, in) and (n, out)


@dataclass(frozen=True, eq=False)
class _Decoded:
    """What a code says about one kind."""

    slots: Slots
    gain: int
    tokens: KindTokens  # what its integers decode to, before strengths
    classes: _Classes


@dataclass(frozen=True, eq=False)
class _Missing:
    """What a code does not say about one kind of its adapter."""

    original: KindTokens  # all tokens of the kind
    shared: KindTokens  # those in the code's slots
    further: KindTokens  # the others
    # From what the code decodes to, to the tokens in its slots: shapes (n, in) and (n, out).
    difference: tuple[NDArray[np.float64], NDArray[np.float64]]


class ResidualCodec:
    """Encode and decode residuals. Works on the CPU in float32."""

    def __init__(self, codec: Codec) -> None:
        self._codec, self._quantizer = codec, codec.quantizer

    @torch.no_grad()
    @one_thread()  # as `decode`: threads may change the last bit, and what is measured here is what is decoded there
    def encode(self, adapter: Adapter, code: bytes, limits: Limits) -> Encoded:
        """Make the residual with the coarsest quantiser step found that keeps the limits."""
        opened = self._codec.open(code)
        parts = self._decoded(opened)
        tokens = tokenize(adapter, self._codec.config, self._codec.sensitivity)
        of_kind = {group.kind: group for group in tokens}
        missing = [_missing(of_kind.get(part.slots.kind), part, opened) for part in parts]

        def at(step: int) -> Encoded:
            data = self._encode_at(step, digest_of(code), opened, parts, missing)
            return compare(self._codec, adapter, self._decode(opened, parts, code, data), data)

        expected = limits.expected_step(WaterFilling(tokens, self._codec.sensitivity, opened.state.subspace))
        return coarsest(math.floor(expected), limits, at)

    @torch.no_grad()
    @one_thread()
    def decode(self, code: bytes, residual: bytes) -> Adapter:
        """Decode a code with its residual."""
        opened = self._codec.open(code)
        return self._decode(opened, self._decoded(opened), code, residual)

    def _decoded(self, opened: OpenCode) -> list[_Decoded]:
        return [self._decoded_kind(group, opened) for group in opened.groups]

    def _decoded_kind(self, group: KindIntegers, opened: OpenCode) -> _Decoded:
        subspace, kind = opened.state.subspace, group.slots.kind
        norms = self._quantizer.norms(group.slots, group.gain, group.residuals)
        scales = self._quantizer.scales(group.slots, norms, subspace, opened.head.step)
        values = group.sides((*self._quantizer.sizes[kind], subspace.rows(kind)))
        classes = classes_of(values[INPUTS], scales[INPUTS]), classes_of(values[OUTPUTS], scales[OUTPUTS])
        tokens = self._codec.dequantised(group, opened.state, opened.head.step)
        return _Decoded(group.slots, group.gain, tokens, classes)

    def _encode_at(
        self,
        step: int,
        digest: str,
        opened: OpenCode,
        parts: Sequence[_Decoded],
        missing: Sequence[_Missing | None],
    ) -> bytes:
        head = opened.head
        strengths, kept = head.strengths.copy(), head.kept.copy()
        scales = np.full((len(head.kept), 2, CLASSES), SMALLEST, dtype=np.int8)
        writer, further = IntegerWriter(), []
        for part, lack in zip(parts, missing, strict=True):
            if lack is None:
                continue
            kind = part.slots.kind
            # Integers of the slots that the code has; their scales are measured, not predicted.
            exact = tuple(values / 2.0 ** (step / OCTAVE) for values in lack.difference)
            scales[kind] = [_measured(values, classes) for values, classes in zip(exact, part.classes, strict=True)]
            inputs, outputs = (clip(np.rint(values)) for values in exact)
            writer.write(np.concatenate([inputs.ravel(), outputs.ravel()]), _flat_scales(scales[kind], part.classes))
            # Slots that the code left out; they are written behind those of all kinds.
            group, keep, rebuilt = quantised(self._codec, lack.further, opened.state, step, part.gain)
            further.append(group)
            np.maximum.at(kept[kind], group.slots.layer, (group.slots.slot + 1).astype(np.uint16))
            finer = _finer(part.tokens, (inputs, outputs), _scales(scales[kind], part.classes), step)
            overlaps = torch.cat([slot_overlaps(lack.shared, finer), slot_overlaps(lack.further, rebuilt)[keep]])
            written = np.concatenate([part.slots.layer, group.slots.layer])
            strengths[kind, np.unique(written)] = strength_of(lack.original, overlaps)
        for group in further:
            write_kind(writer, self._quantizer, [group], opened.state.subspace, step)
        return Residual(digest, ResidualHead(step, strengths, kept, scales), writer.to_bytes()).to_bytes(
            self._codec.config
        )

    def _decode(self, opened: OpenCode, parts: Sequence[_Decoded], code: bytes, data: bytes) -> Adapter:
        residual = Residual.from_bytes(data, code, opened.head, self._codec.config)
        head, reader = residual.head, IntegerReader(residual.words)
        finer = []
        for part in parts:
            kind = part.slots.kind
            values = reader.read(_flat_scales(head.scales[kind], part.classes))
            inputs, outputs = split_sides(values, len(part.slots.layer), self._quantizer.sizes[kind])
            finer.append(_finer(part.tokens, (inputs, outputs), _scales(head.scales[kind], part.classes), head.step))
        tokens = []
        for kept, slots in zip(finer, slots_between(opened.head.kept, head.kept), strict=True):
            gain = int(opened.head.gains[slots.kind])
            group = read_kind(reader, self._quantizer, slots, gain, opened.state.subspace, head.step)
            tokens.append(_joined(kept, self._codec.dequantised(group, opened.state, head.step)))
        return self._codec.assemble(tokens, opened.head, head.strengths)


def classes_of(integers: Integers, scales: Scales) -> NDArray[np.uint8]:
    """Return the class of each of a code's integers, (n, size): 0 if it is not 0, else by the scale of its coding."""
    # A zero under a small scale stands for a value near zero, one under a large scale for any value within half a step.
    likely = np.clip((scales.astype(np.int16) - SMALLEST) // _WIDTH, 0, CLASSES - 2)
    return np.where(integers == 0, likely + 1, 0).astype(np.uint8)


def _missing(original: KindTokens | None, part: _Decoded, opened: OpenCode) -> _Missing | None:
    """Compare what a code decodes to with the original tokens of one kind; None where the adapter has none."""
    if original is None and not len(part.slots.layer):
        return None
    kept = np.where(opened.head.kept == ABSENT, 0, opened.head.kept)[part.slots.kind]  # (L,)
    in_code = None if original is None else original.slot < torch.from_numpy(kept.astype(np.int64))[original.layer]
    if original is None or in_code is None or int(in_code.sum()) != len(part.slots.layer):
        raise CodeError("the code belongs to another adapter")
    shared, given = original[in_code], part.tokens
    # Pairs are defined up to their sign and carry their norm; the code has its own of both.
    agreement = (shared.inputs * given.inputs).sum(1) + (shared.outputs * given.outputs).sum(1)
    factor = (torch.where(agreement < 0, -1.0, 1.0) * (given.norm / shared.norm).sqrt())[:, None]  # (n, 1)
    difference = (
        (shared.inputs * factor - given.inputs).double().numpy(),
        (shared.outputs * factor - given.outputs).double().numpy(),
    )
    return _Missing(original, shared, original[~in_code], difference)


def _measured(values: NDArray[np.float64], classes: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return the scale index of each class: the root mean square of its values, in eighths of an octave."""
    count = np.bincount(classes.ravel(), minlength=CLASSES)
    square = np.bincount(classes.ravel(), weights=np.square(values).ravel(), minlength=CLASSES) / np.maximum(count, 1)
    index = np.rint(OCTAVE / 2 * np.log2(np.maximum(square, math.ulp(0.0))))
    return np.clip(index, SMALLEST, LARGEST).astype(np.int8)


def _scales(table: NDArray[np.int8], classes: _Classes) -> tuple[Scales, Scales]:
    """Return the scale index of each integer from the table (2, 13) of its kind; shapes (n, in) and (n, out)."""
    return table[INPUTS][classes[INPUTS]], table[OUTPUTS][classes[OUTPUTS]]


def _flat_scales(table: NDArray[np.int8], classes: _Classes) -> Scales:
    return np.concatenate([scales.ravel() for scales in _scales(table, classes)])


def _finer(
    tokens: KindTokens, integers: tuple[Integers, Integers], scales: tuple[Scales, Scales], step: int
) -> KindTokens:
    """Add a residual's integers to the tokens that the code decodes to."""
    row = torch.cat([tokens.inputs.flatten(), tokens.outputs.flatten()])
    whole, under = (np.concatenate([side.ravel() for side in sides]) for sides in (integers, scales))
    places = np.flatnonzero(whole != 0)
    row.numpy()[places] += centred(whole.take(places), under.take(places)) * np.float32(2.0 ** (step / OCTAVE))
    end = tokens.inputs.numel()
    inputs, outputs = row[:end].view_as(tokens.inputs), row[end:].view_as(tokens.outputs)
    return KindTokens(tokens.kind, tokens.layer, tokens.slot, tokens.norm, inputs, outputs)


def _joined(kept: KindTokens, further: KindTokens) -> KindTokens:
    """Merge the slots of code and residual, in the order of (layer, slot)."""
    order = torch.from_numpy(
        np.lexsort([torch.cat([kept.slot, further.slot]).numpy(), torch.cat([kept.layer, further.layer]).numpy()])
    )
    pairs = (
        (kept.layer, further.layer),
        (kept.slot, further.slot),
        (kept.norm, further.norm),
        (kept.inputs, further.inputs),
        (kept.outputs, further.outputs),
    )
    return KindTokens(kept.kind, *(torch.cat(pair)[order] for pair in pairs))
