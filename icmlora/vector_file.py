"""The bytes of one task vector: rounded to an eighth of its typical size and range-coded, about 5 bits a value.

    ICMT 1 | length (4) | exponent (2) | range-coded words | check (8)

The step is a power of two to the eighth of an octave; values far above the typical size, which hidden states have, cost
some bits more and keep their relative precision. The rounding error is a thirtieth of the typical size, where the
vectors of two support sets of a task differ by a tenth to a third.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from icmlora.errors import CodeError, DataError
from icmlora.generator.entropy import LIMIT, Reader, Writer, clip
from icmlora.generator.scales import OCTAVE
from icmlora.sealing import seal, unseal

_MAGIC = b"ICMT\x01"
_HEAD = struct.Struct("<Ih")
_START = len(_MAGIC) + _HEAD.size
_STEPS = 3 * OCTAVE
"""Scale index of a typical value: eight steps."""
_TYPICAL = 0.6745
"""Median magnitude of a standard normal value: outliers must not set the step."""
_LARGEST = 1 << 20


def vector_to_bytes(values: torch.Tensor) -> bytes:
    """Write the values of a task vector, float32 of shape (hidden size,); equal values give equal bytes.

    Raises:
        ValueError: Not one dimension, or values that are not finite.
    """
    if values.dim() != 1 or not torch.isfinite(values).all():
        raise ValueError("a task vector is one row of finite values")
    exact = values.detach().cpu().double().numpy()
    typical = float(np.median(np.abs(exact))) / _TYPICAL if len(exact) else 0.0
    typical = max(typical, 16 * float(np.abs(exact).max(initial=0.0)) / LIMIT, 2.0**-120)
    exponent = round(OCTAVE * np.log2(typical)) - _STEPS
    integers = clip(np.rint(exact / 2.0 ** (exponent / OCTAVE)))
    writer = Writer()
    writer.write(integers, np.full(len(integers), _STEPS, dtype=np.int32))
    return seal(_MAGIC + _HEAD.pack(len(integers), exponent) + writer.to_bytes())


def values_from_bytes(data: bytes) -> torch.Tensor:
    """Read the values of a stored task vector, float32 of shape (hidden size,).

    Raises:
        DataError: The bytes are no task vector, or damaged.
    """
    content = unseal(data)
    if content is None or not content.startswith(_MAGIC) or len(content) < _START:
        raise DataError("no task vector: other bytes, or damaged", hint="`icm vectors` makes it again")
    length, exponent = _HEAD.unpack_from(content, len(_MAGIC))
    if not 1 <= length <= _LARGEST or abs(exponent) > 130 * OCTAVE:
        raise DataError("no task vector: its head is out of range")
    try:
        integers = Reader(content[_START:]).read(np.full(length, _STEPS, dtype=np.int32))
    except CodeError as error:
        raise DataError(f"no task vector: {error.message}") from error
    return torch.from_numpy((integers * 2.0 ** (exponent / OCTAVE)).astype(np.float32))
