"""Integers of one adapter <-> streams of words, in the order that encoder and decoder share.

    stream:  norm residuals of a kind | its vectors | the same for the next kind | ...

The norms come first because the scales that the vectors are coded under follow from them. A stream ends with the kind
that fills it, so large kinds can be read in parallel or separately; small adapters have a single stream.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from icmlora.errors import CodeError
from icmlora.generator.codec.code import CodeHead
from icmlora.generator.codec.quantizer import Norms, TokenQuantizer
from icmlora.generator.codec.runs import Nonzeros
from icmlora.generator.files.container import ABSENT
from icmlora.generator.files.entropy_coding import IntegerReader, IntegerWriter
from icmlora.generator.initial_a.subspace import InitialSubspace
from icmlora.generator.network.tokens import Slots
from icmlora.generator.scales import EXTREME
from icmlora.io.threads import side_by_side

_FULL = 1 << 20  # values that fill a stream


@dataclass(frozen=True, eq=False)
class KindIntegers:
    """Everything that a code stores about the tokens of one module kind; n rank slots."""

    slots: Slots
    norms: Norms  # log2, in eighths, shape (n,)
    vectors: Nonzeros  # of inputs, outputs, and the part of the inputs in the initial subspace, in one row


def pack(quantizer: TokenQuantizer, head: CodeHead, subspace: InitialSubspace, groups: Sequence[KindIntegers]) -> bytes:
    """Write the integers of an adapter; groups of one kind are consecutive, ordered by their slots."""
    by_kind: defaultdict[int, list[KindIntegers]] = defaultdict(list)
    for group in groups:
        by_kind[group.slots.kind].append(group)

    def write(kinds: Sequence[Slots]) -> bytes:
        writer = IntegerWriter()
        for kind in (slots.kind for slots in kinds if slots.kind in by_kind):  # a kind without energy has no slots
            parts = by_kind[kind]
            layer, slot = (np.concatenate([getattr(part.slots, name) for part in parts]) for name in ("layer", "slot"))
            slots, norms = Slots(kind, layer, slot), np.concatenate([part.norms for part in parts])
            residuals = quantizer.norm_residuals(slots, int(head.gains[kind]), norms)
            writer.write(residuals, quantizer.norm_scales(slots))
            runs = quantizer.runs(slots, norms, subspace, head.step)
            places, values = runs.places([part.vectors for part in parts], [len(part.slots.layer) for part in parts])
            writer.write_nonzeros(runs.sizes, places, values)
        return writer.to_bytes()

    of_streams = _streams_of(head, quantizer)
    with side_by_side(len(of_streams)) as each:
        streams = list(each(write, of_streams))
    return b"".join([*(struct.pack("<I", len(stream)) for stream in streams[:-1]), *streams])


def unpack(
    quantizer: TokenQuantizer, head: CodeHead, subspace: InitialSubspace, words: bytes
) -> list[Iterator[KindIntegers]]:
    """Read the output of `pack`: one iterator over kinds per stream.

    Raises:
        CodeError: The words are damaged; also raised while kinds are read.
    """
    streams = _streams_of(head, quantizer)
    lengths = 4 * (len(streams) - 1)
    ends = [lengths, *(lengths + np.cumsum(np.frombuffer(words[:lengths], "<u4"), dtype=np.int64)).tolist(), len(words)]
    if len(words) < lengths or ends != sorted(ends):
        raise CodeError("the code's integers are damaged")

    def read(kinds: Sequence[Slots], data: bytes) -> Iterator[KindIntegers]:
        reader = IntegerReader(data)
        for slots in kinds:
            residuals = reader.read(quantizer.norm_scales(slots))
            norms = quantizer.norms(slots, int(head.gains[slots.kind]), residuals)
            if (np.abs(norms) > EXTREME).any():
                raise CodeError("the code's norms are out of range")
            runs = quantizer.runs(slots, norms, subspace, head.step)
            yield KindIntegers(slots, norms, runs.nonzeros(*reader.read_nonzeros(runs.sizes)))

    return [read(kinds, words[start:end]) for kinds, (start, end) in zip(streams, pairwise(ends), strict=True)]


def _streams_of(head: CodeHead, quantizer: TokenQuantizer) -> list[list[Slots]]:
    """Divide the coded slots of each kind that occurs among streams."""
    streams, values = [list[Slots]()], 0
    for kind, kept in enumerate(head.kept):
        if (kept == ABSENT).all():
            continue
        if values >= _FULL:
            streams.append([])
            values = 0
        counts = np.where(kept == ABSENT, 0, kept).astype(np.int64)  # (L,)
        layer = np.repeat(np.arange(len(counts)), counts)
        streams[-1].append(Slots(kind, layer, np.concatenate([np.arange(count) for count in counts])))
        values += len(layer) * sum(quantizer.sizes[kind])
    return streams


def written_slots(slots: Slots, is_worth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return a mask (n,) of the slots to write: in each layer all up to the last one that is worth its bits."""
    # Slots in between are written too, so one number per layer defines the slots of a code.
    count = np.zeros(int(slots.layer.max(initial=-1)) + 1, dtype=np.int64)  # (layers,)
    np.maximum.at(count, slots.layer[is_worth], slots.slot[is_worth] + 1)
    return slots.slot < count[slots.layer]
