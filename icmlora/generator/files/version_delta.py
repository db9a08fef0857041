"""A tuned network's changes <-> words: a version for a fraction of the bytes of a new network.

    scale index of each tensor | exponent of each tensor | integers of each tensor, as one row

A parameter is its earlier version plus integer * 2^(exponent / 8). Tables stay whole eighths. Channel weights
are measured on the base model, not trained; they stay as they are and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from icmlora.errors import CodeError
from icmlora.generator.files.entropy_coding import IntegerReader, Integers, IntegerWriter, clip
from icmlora.generator.files.network_file import TABLES, WEIGHTS, diverged, read_side, scales_of, write_side
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST

_EIGHTHS = -3 * OCTAVE  # exponent of tensors that are stored in whole eighths


def differences_to_words(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], step: float) -> bytes:
    """Write how tensors of equal shapes differ from earlier ones; raise `GeneratorError` if one is not finite."""
    # The step is relative to the root mean square of a tensor's differences. At 2 most of them round to zero.
    names = _written(before)
    exponents, scales = np.zeros((2, len(names)), dtype=np.int32)
    integers: list[Integers] = []
    for number, name in enumerate(names):
        # In float64, so the reader adds exactly the difference rounded here.
        rest = (after[name].detach().cpu().double() - before[name].double()).numpy().ravel()
        if not np.isfinite(rest).all():
            raise diverged()
        size = float(np.sqrt(np.square(rest).mean()))
        if name in TABLES:
            exponents[number] = _EIGHTHS
        elif size:
            exponents[number] = max(round(OCTAVE * np.log2(step * size)), -EXTREME)
        integers.append(clip(np.rint(rest * np.exp2(-exponents[number] / OCTAVE))))
        scales[number] = scales_of(integers[-1][None])[0]
    writer = IntegerWriter()
    write_side(writer, scales)
    write_side(writer, exponents)
    for values, scale in zip(integers, scales, strict=True):
        writer.write(values, np.full(len(values), scale, dtype=np.int32))
    return writer.to_bytes()


def words_to_changed(words: bytes, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Apply the output of `differences_to_words` to earlier tensors; raise `CodeError` if it is damaged."""
    names, reader = _written(before), IntegerReader(words)
    scales, exponents = read_side(reader, len(names)), read_side(reader, len(names))
    if (scales < SMALLEST).any() or (scales > LARGEST).any() or (np.abs(exponents) > EXTREME).any():
        raise CodeError("a scale or a step is out of range")
    changed = dict(before)
    for name, scale, exponent in zip(names, scales, exponents, strict=True):
        values = reader.read(np.full(before[name].numel(), scale, dtype=np.int32)) * np.exp2(exponent / OCTAVE)
        rest = torch.from_numpy(values).reshape(before[name].shape)
        changed[name] = (before[name].double() + rest).float()
    return changed


def _written(before: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in before if not name.startswith(WEIGHTS)]
