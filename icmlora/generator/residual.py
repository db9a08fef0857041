"""The bytes of a residual: what one code lacks to keep more of its adapter.

    ICMR 1 | digest of the code (32) | length of head (4) | head, zlib | range-coded words | check (8)
    head:  step (i2) | strengths (K*L x i1) | kept (K*L x u1) | scales (K*2*13 x i1)

The step is that of the residual's own integers. Strengths and `kept` take the place of the code's; there is never less
kept than by the code. The words are one integer for each of the code's, then norms and integers of the slots that the
code left out, as a code has them. Everything is little-endian, and everything that damages a code damages this.

Code + residual -> adapter, and adapter beside its code -> residual.

    code ──dequantise──▶ x_hat ──┐                               ┌──▶ slots of the code
    adapter ──tokens x───────────┴─ (x - x_hat) / finer step ────┤
                              `── slots that the code left out ──┴──▶ as a code codes them, at the finer step

The residual is measured from what the code gives back, not from its integers: so it is right for a code of any origin,
also for one that was fitted to what the adapter does.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError
from icmlora.generator import entropy_coding as entropy
from icmlora.generator.code import (
    ABSENT,
    CodeHead,
    KindIntegers,
    inflate,
    read_groups,
    slots_between,
    split_sides,
    write_groups,
)
from icmlora.generator.codec import Codec, Encoded, Limits, OpenCode, coarsest, strength_of
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.cvae import INPUTS, OUTPUTS
from icmlora.generator.entropy_coding import Integers, Scales
from icmlora.generator.quantizer import Slots, centred
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST
from icmlora.generator.tokens import KindTokens, slot_overlaps, tokenize
from icmlora.io.checksum import add_checksum, checked
from icmlora.io.devices import one_thread

MAGIC = b"ICMR\x01"
_START = len(MAGIC) + 36
_WIDTH = 4  # scale indices to a class: half an octave
CLASSES = 13
"""What a residual's scale depends on: whether the code's integer is zero, and if so, how likely that was."""


@dataclass(frozen=True, eq=False)
class ResidualHead:
    """Everything of a residual but its range-coded integers."""

    step: int
    """log2 of its quantiser step, in eighths."""
    strengths: NDArray[np.int8]
    """Shape (K, L): in the place of the code's."""
    kept: NDArray[np.uint8]
    """Shape (K, L): rank slots of code and residual together; 255 where the adapter has no such module."""
    scales: NDArray[np.int8]
    """Shape (K, 2, 13): scale index of the integers of each kind, side and class, as they were measured."""


@dataclass(frozen=True, eq=False)
class Residual:
    """What is added to one code."""

    code: str
    """SHA-256 of the code, in hexadecimal."""
    head: ResidualHead
    words: bytes

    def to_bytes(self) -> bytes:
        """Serialise; the same residual gives the same bytes."""
        head = self.head
        parts = (head.strengths, head.kept, head.scales)
        packed = zlib.compress(struct.pack("<h", head.step) + b"".join(part.tobytes() for part in parts), 9)
        return add_checksum(MAGIC + bytes.fromhex(self.code) + struct.pack("<I", len(packed)) + packed + self.words)

    @classmethod
    def from_bytes(cls, data: bytes, code: bytes, under: CodeHead, config: GeneratorConfig) -> Residual:
        """Parse the residual of one code.

        Args:
            data: The residual.
            code: The code, whose digest it must name.
            under: The code's head.
            config: The configuration of the code's generator.

        Raises:
            CodeError: Not a residual, damaged, that of another code, or out of the code's range.
        """
        content = checked(data)
        if content is None or len(content) < _START or not content.startswith(MAGIC):
            raise CodeError("this is not a residual of icm, or it is damaged or cut short")
        digest = content[len(MAGIC) : len(MAGIC) + 32].hex()
        if digest != digest_of(code):
            raise CodeError(f"the residual belongs to code {digest[:12]}, not {digest_of(code)[:12]}")
        (length,) = struct.unpack_from("<I", content, _START - 4)
        kinds, layers = len(config.kinds), config.layers
        sizes = [2, kinds * layers, kinds * layers, kinds * 2 * CLASSES]
        plain = inflate(content[_START : _START + length], sum(sizes), sum(sizes))
        parts = np.split(np.frombuffer(plain, dtype=np.uint8), np.cumsum(sizes)[:-1])
        head = ResidualHead(
            step=int(parts[0].view("<i2")[0]),
            strengths=parts[1].view(np.int8).reshape(kinds, layers),
            kept=parts[2].reshape(kinds, layers),
            scales=parts[3].view(np.int8).reshape(kinds, 2, CLASSES),
        )
        present = under.kept != ABSENT
        if (
            ((head.kept != ABSENT) != present).any()
            or (head.kept[present] < under.kept[present]).any()
            or int(head.kept[present].max()) > config.slots
            or (head.scales < SMALLEST).any()
            or (head.scales > LARGEST).any()
            or abs(head.step) > EXTREME
        ):
            raise CodeError("the residual's head is out of its code's range")
        return cls(digest, head, content[_START + length :])


def digest_of(code: bytes) -> str:
    """Return the SHA-256 of a code, by which its residual names it."""
    return hashlib.sha256(code).hexdigest()


def classes_of(integers: Integers, scales: Scales) -> NDArray[np.uint8]:
    """Return the class of each of a code's integers: 0 where it is not zero, else by the scale it was coded under.

    A zero under a small scale stands for a value near zero, one under a large scale for any within half a step.
    """
    likely = np.clip((scales.astype(np.int16) - SMALLEST) // _WIDTH, 0, CLASSES - 2)
    return np.where(integers == 0, likely + 1, 0).astype(np.uint8)


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class _Layer:
    """What a code says of one kind."""

    slots: Slots
    gain: int
    tokens: KindTokens
    """What it gives back, before strengths."""
    classes: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """Of its integers, shapes (n, in) and (n, out)."""


@dataclass(frozen=True, eq=False)
class _Missing:
    """What a code does not say of one kind of its adapter."""

    original: KindTokens
    """All tokens of the kind."""
    shared: KindTokens
    """Those of the code's slots."""
    further: KindTokens
    """The others."""
    difference: Pair
    """From what the code gives back to the tokens of its slots, shapes (n, in) and (n, out)."""


class LayeredCodec:
    """Adds residuals to codes. Works on the CPU in float32.

    Args:
        codec: The codec of the codes.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec, self._quantizer = codec, codec.quantizer

    @torch.no_grad()
    @one_thread()  # as `decode`: threads may change the last bit, and what is measured here is what is decoded there
    def encode(self, adapter: Adapter, code: bytes, limits: Limits) -> Encoded:
        """Make the residual of the coarsest quantiser step found with which a code keeps some limits.

        Args:
            adapter: The adapter that the code was made of.
            code: The code.
            limits: What code and residual have to keep together.

        Raises:
            CodeError: The code is damaged, or not of this adapter.
            GeneratorError: Float32 cannot keep the limits.
        """
        opened = self._codec.open(code)
        layers = self._layers(opened)
        tokens = tokenize(adapter, self._codec.config, self._codec.sensitivity)
        of_kind = {group.kind: group for group in tokens}
        missing = {layer.slots.kind: _missing(of_kind.get(layer.slots.kind), layer, opened) for layer in layers}

        def at(step: int) -> Encoded:
            data = self._encode_at(step, digest_of(code), opened, layers, missing)
            return self._codec.compare(adapter, self._decode(opened, layers, code, data), data)

        return coarsest(limits.expected_step(tokens, self._codec.sensitivity, opened.state.subspace), limits, at)

    @torch.no_grad()
    @one_thread()
    def decode(self, code: bytes, residual: bytes) -> Adapter:
        """Decode a code with its residual.

        Raises:
            CodeError: One of them is damaged, or the residual is that of another code.
        """
        opened = self._codec.open(code)
        return self._decode(opened, self._layers(opened), code, residual)

    def _layers(self, opened: OpenCode) -> list[_Layer]:
        return [self._layer(group, opened) for group in opened.groups]

    def _layer(self, group: KindIntegers, opened: OpenCode) -> _Layer:
        inputs, outputs, _ = group.scales
        classes = classes_of(group.inputs, inputs), classes_of(group.outputs, outputs)
        given = self._codec.dequantised(group, opened.state, opened.head.step)
        return _Layer(group.slots, group.gain, given, classes)

    def _encode_at(
        self, step: int, digest: str, opened: OpenCode, layers: Sequence[_Layer], missing: dict[int, _Missing | None]
    ) -> bytes:
        head = opened.head
        strengths, kept = head.strengths.copy(), head.kept.copy()
        scales = np.full((len(head.kept), 2, CLASSES), SMALLEST, dtype=np.int8)
        writer, further = entropy.IntegerWriter(), []
        for layer in layers:
            lack = missing[layer.slots.kind]
            if lack is None:
                continue
            kind = layer.slots.kind
            exact = tuple(values / 2.0 ** (step / OCTAVE) for values in lack.difference)
            scales[kind] = [_measured(values, classes) for values, classes in zip(exact, layer.classes, strict=True)]
            inputs, outputs = (entropy.clip(np.rint(values)) for values in exact)
            writer.write(np.concatenate([inputs.ravel(), outputs.ravel()]), _flat_scales(scales[kind], layer.classes))
            group, further_kept, rebuilt = self._codec.quantised(lack.further, opened.state, step, layer.gain)
            further.append(group)
            np.maximum.at(kept[kind], group.slots.layer, (group.slots.slot + 1).astype(np.uint8))
            finer = _finer(layer.tokens, (inputs, outputs), _scales(scales[kind], layer.classes), step)
            overlaps = torch.cat([slot_overlaps(lack.shared, finer), slot_overlaps(further_kept, rebuilt)])
            written = np.concatenate([layer.slots.layer, group.slots.layer])
            strengths[kind, np.unique(written)] = strength_of(lack.original, overlaps)
        write_groups(writer, self._quantizer, further)
        return Residual(digest, ResidualHead(step, strengths, kept, scales), writer.to_bytes()).to_bytes()

    def _decode(self, opened: OpenCode, layers: Sequence[_Layer], code: bytes, data: bytes) -> Adapter:
        residual = Residual.from_bytes(data, code, opened.head, self._codec.config)
        head, reader = residual.head, entropy.IntegerReader(residual.words)
        finer = []
        for layer in layers:
            kind = layer.slots.kind
            values = reader.read(_flat_scales(head.scales[kind], layer.classes))
            inputs, outputs = split_sides(values, len(layer.slots.layer), self._quantizer.sizes(kind))
            finer.append(_finer(layer.tokens, (inputs, outputs), _scales(head.scales[kind], layer.classes), head.step))
        slots = slots_between(opened.head.kept, head.kept)
        subspace = opened.state.subspace
        groups = read_groups(reader, self._quantizer, slots, opened.head.gains, subspace, head.step)
        tokens = (
            _joined(kept, self._codec.dequantised(group, opened.state, head.step))
            for kept, group in zip(finer, groups, strict=True)
        )
        return self._codec.assemble(tokens, opened.head, head.strengths)


def _missing(original: KindTokens | None, layer: _Layer, opened: OpenCode) -> _Missing | None:
    """Compare what a code gives back of one kind with its adapter; None where the adapter has nothing there.

    Raises:
        CodeError: The code has slots that the adapter lacks.
    """
    if original is None and not len(layer.slots.layer):
        return None
    kept = np.where(opened.head.kept == ABSENT, 0, opened.head.kept)[layer.slots.kind]
    in_code = None if original is None else original.slot < torch.from_numpy(kept.astype(np.int64))[original.layer]
    if original is None or in_code is None or int(in_code.sum()) != len(layer.slots.layer):
        raise CodeError("the code is not that of this adapter")
    shared, given = original[in_code], layer.tokens
    # Pairs are defined up to their sign and carry their norm; the code has its own of both.
    agreement = (shared.inputs * given.inputs).sum(1) + (shared.outputs * given.outputs).sum(1)
    factor = (torch.where(agreement < 0, -1.0, 1.0) * (given.norm / shared.norm).sqrt())[:, None]
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


def _scales(table: NDArray[np.int8], classes: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> tuple[Scales, Scales]:
    """Return the scale index of each integer from the table (2, 13) of its kind; shapes (n, in) and (n, out)."""
    return table[INPUTS][classes[INPUTS]], table[OUTPUTS][classes[OUTPUTS]]


def _flat_scales(table: NDArray[np.int8], classes: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> Scales:
    return np.concatenate([scales.ravel() for scales in _scales(table, classes)])


def _finer(
    tokens: KindTokens, integers: tuple[Integers, Integers], scales: tuple[Scales, Scales], step: int
) -> KindTokens:
    """Add a residual's integers to what the code gives back."""
    inputs, outputs = (
        values + torch.from_numpy(centred(whole, scale)).mul_(2.0 ** (step / OCTAVE))
        for values, whole, scale in zip((tokens.inputs, tokens.outputs), integers, scales, strict=True)
    )
    return KindTokens(tokens.kind, tokens.layer, tokens.slot, tokens.norm, inputs, outputs)


def _joined(kept: KindTokens, further: KindTokens) -> KindTokens:
    """Put the slots of code and residual in order."""
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
