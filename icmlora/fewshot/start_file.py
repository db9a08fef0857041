"""The bytes of a few-shot start, which a store keeps next to its generator.

    ICMS 1 | length of head (4) | head: JSON, zlib | code of the mean (icmlora/generator/codec/code.py) | checksum (8)

The mean is stored as any adapter is: as a code of the generator. The head holds sizes, rates and slopes as whole
eighths of an octave, in the natural order of the mean's modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from icmlora.adapter.model import Adapter
from icmlora.errors import CodeError, GeneratorError
from icmlora.fewshot.start import FewShotStart
from icmlora.generator.codec.codec import Codec
from icmlora.generator.codec.encoding import encode_adapter
from icmlora.generator.codec.limits import Limits
from icmlora.generator.files.container import inflate, open_container, write_container

MAGIC = b"ICMS\x01"
_HEAD_LIMIT = 1 << 22  # largest head, in bytes
_STEPS_LIMIT = 64
_EXPONENT_LIMIT = 1024  # largest size, rate or slope, in eighths
_TASKS_LIMIT = 1 << 32
# Weighted error of the mean's code: half of its size buys less than 0.01 of retained gain (docs/results/LOG.md).
_TOLERANCE = 0.25


def mean_code(start: FewShotStart, codec: Codec) -> bytes:
    """Encode a start's mean; the lengths of steps are then learned for the adapter that the code decodes to."""
    return encode_adapter(codec, start.adapter, {}, limits=Limits(tolerance=_TOLERANCE)).data


def fewshot_start_to_bytes(start: FewShotStart, code: bytes) -> bytes:
    """Serialise a start whose mean the code holds; equal starts give equal bytes."""
    head = {
        "sizes": start.sizes,
        "rates": start.rates,
        "slopes": start.slopes,
        "in_context": start.in_context,
        "tasks": start.tasks,
    }
    return write_container(MAGIC, json.dumps(head, sort_keys=True).encode(), code)


def fewshot_start_from_bytes(data: bytes, decode: Callable[[bytes], Adapter]) -> FewShotStart:
    """Read a few-shot start; raise `GeneratorError` if it is damaged, or of another generator."""
    opened = open_container(data, len(MAGIC)) if data.startswith(MAGIC) else None
    if opened is None:
        message = "not a few-shot start, or it is damaged or in another format"
        raise GeneratorError(message, hint="run `icm train --few-shot` to train it again")
    packed, code = opened
    try:
        head = json.loads(inflate(packed, 2, _HEAD_LIMIT))
        start = FewShotStart(
            adapter=decode(code),
            sizes=_whole(head["sizes"]),
            rates=tuple(_whole(row) for row in head["rates"]),
            slopes=_whole(head["slopes"]),
            in_context=_whole(head["in_context"]),
            tasks=_whole([head["tasks"]], _TASKS_LIMIT)[0],
        )
    except (CodeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise GeneratorError(f"the few-shot start is damaged or belongs to another generator ({error})") from error
    # One size and rate per module, and one slope per step.
    rows, steps = {len(start.sizes), *map(len, start.rates)}, {len(start.slopes), len(start.in_context)}
    fits = rows == {len(start.adapter.modules)} and steps == {len(start.rates)}
    if not fits or start.tasks < 1 or not 1 <= len(start.rates) <= _STEPS_LIMIT:
        raise GeneratorError("the header of the few-shot start does not match its mean")
    return start


def _whole(values: object, limit: int = _EXPONENT_LIMIT) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and abs(value) <= limit for value in values):
        raise ValueError("a row of the header is out of range")
    return tuple(values)
