"""The bytes of one task's code.

    ICMC 3 | generator digest (32) | length of head (4) | head, zlib | range-coded words | check (8)
    head:  step (i2) | condition (C x i1) | latent (Z x i1) | gains (K x i2) | strengths (K*L x i1) | kept (K*L x u1) |
           shifts (K*S x i1) | boosts (K*S x i1) | initial A (icmlora/generator/initial_bytes.py) | task type (utf-8)

ICMC 2 had neither shifts, boosts nor initial A; such a code is read as one of which no initial A is known.

`kept` holds the number of rank slots coded for each (kind, layer), 255 where the adapter has no such module. The words
are the rounded log-norms of all kept slots, then the integers of their two vectors, kind by kind. Everything is
little-endian. How many words there are follows from the head and the generator, so a code cannot claim more memory
than its generator's own layout allows.

The check is the beginning of the SHA-256 of everything before it: damage anywhere is refused, also outside a store.

All integers of one adapter <-> range-coded words, in the order that encoder and decoder share.

First the norm residuals of all kinds, which tell the scales of the rest; then the vectors of every slot, kind by kind.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.formats.peft_config import MAX_LABEL
from icmlora.generator import entropy_coding as entropy
from icmlora.generator.config import GeneratorConfig
from icmlora.generator.entropy_coding import Integers
from icmlora.generator.initial_a.draw import (
    MADE_ELSEWHERE,
    InitialA,
    initial_from_bytes,
    initial_size,
    initial_to_bytes,
)
from icmlora.generator.scales import EXTREME
from icmlora.io.checksum import add_checksum, checked

if TYPE_CHECKING:  # they import torch, and reading the head of a code does not
    from icmlora.generator.initial_a.subspace import InitialSubspace
    from icmlora.generator.quantizer import Sides, SideScales, Slots, TokenQuantizer

MAGIC = b"ICMC\x03"
_BEFORE = b"ICMC\x02"
ABSENT = 255
_TASK_TYPE_LIMIT = 4 * MAX_LABEL  # in UTF-8


@dataclass(frozen=True, eq=False)
class CodeHead:
    """Everything of a code but its range-coded integers."""

    step: int
    """log2 of the quantiser step, in eighths."""
    condition: NDArray[np.int8]
    """Shape (C,)."""
    latent: NDArray[np.int8]
    """Shape (Z,)."""
    gains: NDArray[np.int16]
    """Shape (K,): the task's mean log2 norm above the table, in eighths."""
    strengths: NDArray[np.int8]
    """Shape (K, L): the decoded dW of a module is multiplied by 2^(strength / 64)."""
    kept: NDArray[np.uint8]
    """Shape (K, L)."""
    shifts: NDArray[np.int8]
    """Shape (K, S): how much of the inputs is left across the initial subspace (`InitialSubspace.shifts`)."""
    boosts: NDArray[np.int8]
    """Shape (K, S): how much longer refinement made that (`InitialSubspace.boosts`)."""
    initial: InitialA | None
    task_type: str | None


@dataclass(frozen=True, eq=False)
class Code:
    """One task's code: it can be decoded with the generator it names and nothing else."""

    generator: str
    """SHA-256 of the generator file, in hexadecimal."""
    head: CodeHead
    words: bytes

    def to_bytes(self, config: GeneratorConfig) -> bytes:
        """Serialise; the same code of one generator gives the same bytes."""
        head = self.head
        plain = b"".join(
            [
                struct.pack("<h", head.step),
                head.condition.tobytes(),
                head.latent.tobytes(),
                head.gains.astype("<i2").tobytes(),
                head.strengths.tobytes(),
                head.kept.tobytes(),
                head.shifts.tobytes(),
                head.boosts.tobytes(),
                initial_to_bytes(head.initial, config),
                (head.task_type or "").encode(),
            ]
        )
        packed = zlib.compress(plain, 9)
        return add_checksum(
            MAGIC + bytes.fromhex(self.generator) + struct.pack("<I", len(packed)) + packed + self.words
        )

    @classmethod
    def from_bytes(cls, data: bytes, config: GeneratorConfig) -> Code:
        """Parse a code made under one generator configuration.

        Raises:
            CodeError: Not a code, cut short, or out of the configuration's range.
        """
        generator, start = generator_of(data), len(MAGIC) + 36
        content = checked(data)
        if content is None or len(content) < start:
            raise CodeError("the code is damaged or cut short")
        (length,) = struct.unpack_from("<I", content, start - 4)
        kinds, layers = len(config.kinds), config.layers
        sizes = [2, config.condition, config.latent, 2 * kinds, kinds * layers, kinds * layers]
        known = [kinds * config.slots, kinds * config.slots, initial_size(config)]
        if data.startswith(_BEFORE):
            least, blank = sum(sizes), bytes(sum(known))
        else:
            least, blank = sum(sizes) + sum(known), b""
        plain = inflate(content[start : start + length], least, least + _TASK_TYPE_LIMIT)
        plain = plain[: sum(sizes)] + blank + plain[sum(sizes) :]
        sizes += known
        parts = np.split(np.frombuffer(plain[: sum(sizes)], dtype=np.uint8), np.cumsum(sizes)[:-1])
        head = CodeHead(
            step=int(parts[0].view("<i2")[0]),
            condition=parts[1].view(np.int8),
            latent=parts[2].view(np.int8),
            gains=parts[3].view("<i2").astype(np.int16),
            strengths=parts[4].view(np.int8).reshape(kinds, layers),
            kept=parts[5].reshape(kinds, layers),
            shifts=parts[6].view(np.int8).reshape(kinds, config.slots),
            boosts=parts[7].view(np.int8).reshape(kinds, config.slots),
            initial=initial_from_bytes(parts[8].tobytes(), config),
            task_type=_text(plain[sum(sizes) :]),
        )
        present = head.kept[head.kept != ABSENT]
        if not config.are_modules(np.argwhere(head.kept != ABSENT).tolist()):
            raise CodeError("the code's head names a module twice, or one that there cannot be", hint=MADE_ELSEWHERE)
        if not len(present) or int(present.max()) > config.slots or abs(head.step) > EXTREME:
            raise CodeError("the code's head is out of its generator's range")
        return cls(generator, head, content[start + length :])


def inflate(packed: bytes, least: int, most: int) -> bytes:
    """Decompress exactly one zlib stream of a bounded size; a small one cannot grow into a large one.

    Raises:
        CodeError: It is damaged, or not alone, or of another size.
    """
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(packed, most + 1)
    except zlib.error as error:
        raise CodeError("the code's head is damaged") from error
    if not reader.eof or reader.unused_data or not least <= len(plain) <= most:
        raise CodeError("the code's head does not have the length its generator says")
    return plain


def _text(data: bytes) -> str | None:
    try:
        return data.decode() or None
    except UnicodeDecodeError as error:
        raise CodeError("the code's head is damaged") from error


def generator_of(data: bytes) -> str:
    """Return the digest of the generator that a code belongs to, without decoding it.

    Raises:
        CodeError: Not a code.
    """
    if not data.startswith((MAGIC, _BEFORE)) or len(data) < len(MAGIC) + 36:
        raise CodeError("this is not a code of icm, or it was cut short")
    return data[len(MAGIC) : len(MAGIC) + 32].hex()


_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class KindIntegers:
    """Everything that is stored of the tokens of one kind."""

    slots: Slots
    gain: int
    """The task's mean log2 norm above the table, in eighths."""
    residuals: Integers
    """Shape (n,): log2 norms above that, in eighths."""
    inputs: Integers
    """Shape (n, in)."""
    outputs: Integers
    """Shape (n, out)."""
    along: Integers
    """Shape (n, R): of the inputs, what lies along the initial subspace."""
    scales: SideScales
    """What the vectors' integers are coded under."""

    @property
    def sides(self) -> Sides:
        """The integers of the vectors."""
        return self.inputs, self.outputs, self.along

    def __getitem__(self, chosen: NDArray[np.bool_]) -> KindIntegers:
        """Choose slots with a mask of shape (n,)."""
        inputs, outputs, along = (side[chosen] for side in self.sides)
        left, right, under = (scales[chosen] for scales in self.scales)
        residuals = self.residuals[chosen]
        return KindIntegers(self.slots[chosen], self.gain, residuals, inputs, outputs, along, (left, right, under))


def written_slots(slots: Slots, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out, in each layer, the slots after the last one that is worth its bits (`alive`, shape (n,)).

    The slots before are kept, so that a number per layer says which.
    """
    count = np.zeros(int(slots.layer.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(count, slots.layer[alive], slots.slot[alive] + 1)
    return slots.slot < count[slots.layer]


def pack(quantizer: TokenQuantizer, groups: Sequence[KindIntegers]) -> bytes:
    """Write the integers of an adapter; at most one group per kind, ordered by kind."""
    writer = entropy.IntegerWriter()
    write_groups(writer, quantizer, groups)
    return writer.to_bytes()


def write_groups(writer: entropy.IntegerWriter, quantizer: TokenQuantizer, groups: Sequence[KindIntegers]) -> None:
    """Append the integers of some slots; at most one group per kind, ordered by kind."""
    for group in groups:
        writer.write(group.residuals, quantizer.norm_scales(group.slots))
    for group in groups:
        writer.write(_flat(group.sides), _flat(group.scales))


def unpack(quantizer: TokenQuantizer, head: CodeHead, subspace: InitialSubspace, words: bytes) -> list[KindIntegers]:
    """Read back what `pack` wrote.

    Raises:
        CodeError: Words that `pack` does not write under this head.
    """
    none = np.zeros_like(head.kept)
    slots = slots_between(none, head.kept)
    return read_groups(entropy.IntegerReader(words), quantizer, slots, head.gains, subspace, head.step)


def read_groups(
    reader: entropy.IntegerReader,
    quantizer: TokenQuantizer,
    kinds: Sequence[Slots],
    gains: NDArray[np.int16],
    subspace: InitialSubspace,
    step: int,
) -> list[KindIntegers]:
    """Read back what `write_groups` wrote of some slots.

    Raises:
        CodeError: Words that it does not write.
    """
    residuals = [reader.read(quantizer.norm_scales(slots)) for slots in kinds]
    groups = []
    for slots, residual in zip(kinds, residuals, strict=True):
        gain = int(gains[slots.kind])
        norms = quantizer.norms(slots, gain, residual)
        if (np.abs(norms) > EXTREME).any():
            raise CodeError("the code's norms are out of range")
        scales = quantizer.scales(slots, norms, subspace, step)
        values = reader.read(_flat(scales))
        inputs, outputs, along = split_sides(values, len(slots.layer), [side.shape[1] for side in scales])
        groups.append(KindIntegers(slots, gain, residual, inputs, outputs, along, scales))
    return groups


def split_sides(values: Integers, count: int, sizes: Sequence[int]) -> list[Integers]:
    """Take apart the integers of `count` slots, one side after the other; shapes (count, size)."""
    ends = np.cumsum([count * size for size in sizes])[:-1]
    return [side.reshape(count, size) for side, size in zip(np.split(values, ends), sizes, strict=True)]


def slots_between(first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> list[Slots]:
    """Return, for each kind that occurs, the slots from `first` on that are kept; both of shape (K, L)."""
    return [_slots(kind, first[kind], row) for kind, row in enumerate(kept) if (row != ABSENT).any()]


def _flat(sides: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
    """Put sides one after the other, shape (all of them,)."""
    return np.concatenate([side.ravel() for side in sides])


def _slots(kind: int, first: NDArray[np.uint8], kept: NDArray[np.uint8]) -> Slots:
    from icmlora.generator.quantizer import Slots

    begins = np.where(kept == ABSENT, 0, first).astype(np.int64)
    ends = np.where(kept == ABSENT, 0, kept).astype(np.int64)
    layer = np.repeat(np.arange(len(ends)), ends - begins)
    slot = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    return Slots(kind, layer, slot)
