"""The start file: what a generator knows of tasks that it has not seen, beside its own file.

    ICMS 1 | length of head (4) | head: JSON, zlib | code of the mean (icmlora/generator/code.py) | check (8)

The mean is stored as any adapter is, as a code of the generator; the head holds sizes, rates and slopes as whole
eighths of an octave, in the natural order of the mean's modules. The check is the beginning of the SHA-256 of the rest.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable

from icmlora.adaptation.start import Start
from icmlora.adapter import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.code import inflate
from icmlora.generator.codec import Codec
from icmlora.sealing import seal, unseal

MAGIC = b"ICMS\x01"
_BEFORE_HEAD = len(MAGIC) + 4
_HEAD_LIMIT = 1 << 22
_STEPS_LIMIT = 64
_EXPONENT_LIMIT = 1024
_TASKS_LIMIT = 1 << 32
_TOLERANCE = 0.25
"""Weighted error of the mean's code: half of its size buys less than 0.01 of retained gain (docs/results/LOG.md)."""


def mean_code(start: Start, codec: Codec) -> bytes:
    """Encode a start's mean under a generator; the lengths of steps are then learned for what it decodes to.

    Raises:
        GeneratorError: The generator does not cover the mean.
    """
    return codec.encode(start.adapter, {}, tolerance=_TOLERANCE).data


def start_to_bytes(start: Start, code: bytes) -> bytes:
    """Write a start whose mean is what a code decodes to; the same start gives the same bytes."""
    head = {"sizes": start.sizes, "rates": start.rates, "slopes": start.slopes, "tasks": start.tasks}
    packed = zlib.compress(json.dumps(head, sort_keys=True).encode(), 9)
    return seal(MAGIC + struct.pack("<I", len(packed)) + packed + code)


def start_from_bytes(data: bytes, decode: Callable[[bytes], Adapter]) -> Start:
    """Read a start file.

    Args:
        data: The file.
        decode: Turns the mean's code into an adapter, as the generator's codec does.

    Raises:
        GeneratorError: Not a start file, of a newer format, damaged, or of another generator.
    """
    content = unseal(data) if data.startswith(MAGIC) else None
    if content is None or len(content) < _BEFORE_HEAD:
        raise GeneratorError("not a start file, of another format, or damaged", hint="`icm train --objective both`")
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    end = _BEFORE_HEAD + length
    try:
        head = json.loads(inflate(content[_BEFORE_HEAD:end], 2, _HEAD_LIMIT))
        adapter = decode(content[end:])
        start = Start(
            adapter=adapter,
            sizes=_whole(head["sizes"]),
            rates=tuple(_whole(row) for row in head["rates"]),
            slopes=_whole(head["slopes"]),
            tasks=_whole([head["tasks"]], _TASKS_LIMIT)[0],
        )
    except (CodeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise GeneratorError(f"the start file is damaged or of another generator ({error})") from error
    lengths = {len(start.sizes), *map(len, start.rates)}
    if (
        start.tasks < 1
        or lengths != {len(adapter.modules)}
        or not 1 <= len(start.rates) == len(start.slopes) <= _STEPS_LIMIT
    ):
        raise GeneratorError("the start file's head is not that of its mean")
    return start


def _whole(values: object, limit: int = _EXPONENT_LIMIT) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and abs(value) <= limit for value in values):
        raise ValueError("a row of the head is out of range")
    return tuple(values)
