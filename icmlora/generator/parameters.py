"""A network's parameters <-> range-coded words: the generator's own bytes, counted in every bill.

    tables             rounded to eighths, which is how they are used
    channel weights    halves already
    everything else    rows of about normal values: rounded to a quarter of the row's root mean square (about 4 bits)

Channel weights repeat: the modules of a layer read the same inputs, and neighbouring layers are alike. Each row of
weights is stored as the difference to the earlier row that leaves least, up to a constant that is stored with it.

What tuning changed of a network <-> range-coded words: a version that costs a fraction of a network of its own.

    scale index of each tensor | exponent of each tensor | integers of each tensor, all as one row

A parameter is that of the earlier version plus integer * 2^(exponent / 8). Tables stay whole eighths. Channel weights
are measured on the base model, not trained; they stay as they are and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.entropy_coding import IntegerReader, Integers, IntegerWriter, clip
from icmlora.generator.scales import EXTREME, LARGEST, OCTAVE, SMALLEST

TABLES = ("norm_mean", "norm_spread", "spread", "condition.shift", "condition.log_scale")
"""Names of the tensors that are stored in whole eighths."""
WEIGHTS = "weight_"
"""How the names of channel weights begin."""
_WEIGHT_GRID = 2
"""Weights are whole halves."""
_RESOLUTION = 2 * OCTAVE
"""log2 of a row's root mean square in quantiser steps, in eighths."""
_ZERO = -(1 << 12)
"""Exponent of a row of zeros."""
_SIDE = 3 * OCTAVE
"""Scale index of everything stored about rows."""


def parameters_to_words(state: Mapping[str, torch.Tensor]) -> bytes:
    """Write a network's tensors, in the order of `state`.

    Raises:
        GeneratorError: A value is not finite.
    """
    writer = IntegerWriter()
    weights: list[Integers] = []
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise GeneratorError("training has diverged", hint="train again with a lower learning rate")
        rows = _rows(tensor).detach().cpu().double().numpy()
        if name.startswith(WEIGHTS):
            _write_weights(writer, clip(np.rint(rows * _WEIGHT_GRID)), weights)
        elif name in TABLES:
            _write_table(writer, clip(np.rint(rows * OCTAVE)))
        else:
            _write_rows(writer, rows)
    return writer.to_bytes()


def words_to_parameters(words: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read back what `parameters_to_words` wrote; every machine reads the same integers.

    Args:
        words: The bytes.
        shapes: Of the network's tensors, in its order.

    Raises:
        CodeError: Words that no encoder wrote.
    """
    reader = IntegerReader(words)
    weights: list[Integers] = []
    state = {}
    for name, shape in shapes.items():
        rows, columns = _rows(torch.empty(shape, device="meta")).shape
        if name.startswith(WEIGHTS):
            values = _read_weights(reader, rows, columns, weights) / _WEIGHT_GRID
        elif name in TABLES:
            values = _read_table(reader, rows, columns) / OCTAVE
        else:
            values = _read_rows(reader, rows, columns)
        state[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
    return state


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


def _write_rows(writer: IntegerWriter, rows: NDArray[np.float64]) -> None:
    power = np.square(rows).mean(axis=1)
    used = power > 2.0**-200
    level = np.rint(OCTAVE * np.log2(np.where(used, power, 1.0)) / 2).astype(np.int32) - _RESOLUTION
    exponents = np.where(used, level, _ZERO).astype(np.int32)
    write_side(writer, exponents)
    steps = np.exp2(exponents[used] / OCTAVE)[:, None]
    integers = clip(np.rint(rows[used] / steps))
    writer.write(integers.ravel(), np.full(integers.size, _RESOLUTION, dtype=np.int32))


def _read_rows(reader: IntegerReader, rows: int, columns: int) -> NDArray[np.float64]:
    exponents = read_side(reader, rows)
    used = exponents != _ZERO
    scales = np.full(int(used.sum()) * columns, _RESOLUTION, dtype=np.int32)
    values = np.zeros((rows, columns))
    if (np.abs(exponents[used]) > -_ZERO).any():
        raise CodeError("a step is out of range")
    values[used] = reader.read(scales).reshape(-1, columns) * np.exp2(exponents[used] / OCTAVE)[:, None]
    return values


def _write_table(writer: IntegerWriter, integers: Integers) -> None:
    middles = np.rint(np.median(integers, axis=1)).astype(np.int32)
    rest = integers - middles[:, None]
    scales = scales_of(rest)
    write_side(writer, middles)
    write_side(writer, scales)
    writer.write(rest.ravel(), np.repeat(scales, rest.shape[1]))


def _read_table(reader: IntegerReader, rows: int, columns: int) -> Integers:
    middles, scales = read_side(reader, rows), read_side(reader, rows)
    if (scales < SMALLEST).any() or (scales > LARGEST).any():
        raise CodeError("a scale is out of range")
    integers: Integers = reader.read(np.repeat(scales, columns)).reshape(rows, columns)
    integers += middles[:, None]
    return integers


def _write_weights(writer: IntegerWriter, integers: Integers, known: list[Integers]) -> None:
    """Write rows of weights, each above the earlier row that leaves least, or above none; `known` grows by them."""
    for row in integers:
        rests = [row - earlier for earlier in _references(known, len(integers), len(row))]
        best = min(range(len(rests)), key=lambda number: float(np.abs(rests[number] - np.median(rests[number])).sum()))
        write_side(writer, np.array([best], dtype=np.int32))
        _write_table(writer, rests[best][None])
        known.append(row)


def _read_weights(reader: IntegerReader, rows: int, columns: int, known: list[Integers]) -> Integers:
    for _ in range(rows):
        references = _references(known, rows, columns)
        best = int(read_side(reader, 1)[0])
        if not 0 <= best < len(references):
            raise CodeError("a row of weights refers to no earlier one")
        known.append(_read_table(reader, 1, columns)[0] + references[best])
    return np.stack(known[-rows:])


def _references(known: Sequence[Integers], layers: int, columns: int) -> list[Integers]:
    """Return zeros, the row before, and the rows of the same layer in the tensors before, where the sizes agree."""
    backs = (1, *range(layers, len(known) + 1, layers))
    rows = [known[-back] for back in backs if back <= len(known)]
    return [np.zeros(columns, dtype=np.int32), *(row for row in rows if len(row) == columns)]


def scales_of(rest: Integers) -> Integers:
    """Return the scale index of each row of integers, shape (n,) for (n, size)."""
    power = np.square(rest.astype(np.float64)).mean(axis=1)
    index = np.rint(OCTAVE * np.log2(np.maximum(power, 1e-9)) / 2)
    scales: Integers = np.clip(index, SMALLEST, LARGEST).astype(np.int32)
    return scales


def write_side(writer: IntegerWriter, values: Integers) -> None:
    """Write something about rows or tensors, shape (n,): each as its distance to the one before."""
    writer.write(np.diff(values, prepend=0).astype(np.int32), np.full(len(values), _SIDE, dtype=np.int32))


def read_side(reader: IntegerReader, count: int) -> Integers:
    """Read back what `write_side` wrote, shape (count,)."""
    values: Integers = np.cumsum(reader.read(np.full(count, _SIDE, dtype=np.int32))).astype(np.int32)
    return values


_EIGHTHS = -3 * OCTAVE
"""Exponent of what is stored in whole eighths."""


def differences_to_words(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], step: float) -> bytes:
    """Write how the tensors of a network differ from those of an earlier version.

    Args:
        before: The earlier version's, as they are read back, in the network's order.
        after: The network's.
        step: What differences are rounded to, in terms of the root mean square of a tensor's differences. At 2 most of
            them round to zero.

    Raises:
        GeneratorError: A value is not finite.
    """
    names = _written(before)
    exponents, scales = np.zeros((2, len(names)), dtype=np.int32)
    integers: list[Integers] = []
    for number, name in enumerate(names):
        rest = (after[name].detach().cpu().double() - before[name].double()).numpy().ravel()
        if not np.isfinite(rest).all():
            raise GeneratorError("training has diverged", hint="train again with a lower learning rate")
        exponents[number] = _EIGHTHS if name in TABLES else _exponent(rest, step)
        integers.append(clip(np.rint(rest * np.exp2(-exponents[number] / OCTAVE))))
        scales[number] = scales_of(integers[-1][None])[0]
    writer = IntegerWriter()
    write_side(writer, scales)
    write_side(writer, exponents)
    for values, scale in zip(integers, scales, strict=True):
        writer.write(values, np.full(len(values), scale, dtype=np.int32))
    return writer.to_bytes()


def words_to_changed(words: bytes, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that `differences_to_words` wrote; every machine reads the same integers.

    Args:
        words: The bytes.
        before: The tensors of the earlier version, in the network's order.

    Raises:
        CodeError: Words that no encoder wrote.
    """
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


def _exponent(rest: NDArray[np.float64], step: float) -> int:
    """Return log2 of what differences are rounded to, in eighths; 0 where there are none."""
    size = float(np.sqrt(np.square(rest).mean()))
    return max(round(OCTAVE * np.log2(step * size)), -EXTREME) if size else 0
