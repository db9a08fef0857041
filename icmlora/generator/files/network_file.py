"""A trained network <-> a generator file of one version: the generator's own bytes, which count in every bill.

    ICMG 4 | length of header (4) | header: JSON, zlib | words | checksum (8)

The header holds the configuration, and digests of the coding tables and of the parameters' shapes; the words hold the
rounded parameters. Codes are made under the network as it is read back, so rounding costs no accuracy.

    tables             whole eighths of an octave, as they are used
    channel weights    whole halves of an octave, as they are made
    everything else    rows of roughly normal values, rounded to a quarter of the row's root mean square (about 4 bits)

Channel weights repeat: the modules of a layer read the same inputs, and neighbouring layers are alike. So each row of
weights is stored as the difference from the most similar earlier row, up to a constant stored with the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from icmlora.errors import CodeError, GeneratorError
from icmlora.generator.files.container import write_container
from icmlora.generator.files.entropy_coding import IntegerReader, Integers, IntegerWriter, clip
from icmlora.generator.files.file import MAGIC, config_in, split_network
from icmlora.generator.network.cvae import CVAE, VIEWS
from icmlora.generator.scales import LARGEST, OCTAVE, SMALLEST, tables_digest

# A parameter of an ordinary row takes half a byte; rows of zeros, which a fresh network has, take next to nothing.
_VALUES_PER_BYTE = 1000
# Names of the tensors that are stored in whole eighths of an octave.
TABLES = ("norm_mean", "norm_spread", "spread", "condition.shift", "condition.log_scale")
WEIGHTS = "weight_"  # prefix of the names of channel weights
_WEIGHT_GRID = 2  # steps per octave: weights are whole halves
_RESOLUTION = 2 * OCTAVE  # log2 of a row's root mean square in quantiser steps, in eighths
_ZERO = -(1 << 12)  # exponent of a row of zeros
_SIDE = 3 * OCTAVE  # scale index of numbers stored per row or tensor


def generator_to_bytes(net: CVAE, notes: Mapping[str, str] | None = None) -> bytes:
    """Serialise a network; equal parameters give equal bytes."""
    own = {"config": net.config.to_json(), "shapes": _shapes_digest(net), "tables": tables_digest()}
    header = json.dumps({**(notes or {}), **own}, sort_keys=True)
    return write_container(MAGIC, header.encode(), parameters_to_words(net.state_dict()))


def network_from_bytes(data: bytes) -> CVAE:
    """Read a generator file of one version; raise `GeneratorError` if it is damaged or has other tables."""
    header, words = split_network(data)
    if header.get("tables") != tables_digest():
        message = "the coding tables on this machine differ from the tables of the machine that trained this generator"
        raise GeneratorError(message, hint="decode on a machine with the same C library, or train again here")
    config, mismatch = config_in(header), "the generator's parameters do not fit its configuration"
    # Count the values in the parts of a network that grow with its configuration, to refuse one that claims far more
    # than the file can hold before allocating anything.
    sides = sum(kind.inputs + kind.outputs for kind in config.kinds)
    places = len(config.kinds) * config.layers * config.slots
    task = config.condition + config.latent
    embedded = config.layers + config.slots + 2 * len(config.kinds) + len(VIEWS) * config.condition_size
    least = (config.width + config.sketch) * sides + places + config.width * task + config.embedding * embedded
    if least > _VALUES_PER_BYTE * len(words):
        raise GeneratorError(mismatch)
    try:
        with torch.random.fork_rng(devices=[]):  # discards the initial values; keeps the caller's stream
            net = CVAE(config)
        if _shapes_digest(net) != header.get("shapes"):
            raise ValueError("other shapes")
        net.load_state_dict(words_to_parameters(words, {name: one.shape for name, one in net.state_dict().items()}))
    except (CodeError, RuntimeError, TypeError, ValueError) as error:
        raise GeneratorError(mismatch) from error
    return net.eval()


def _shapes_digest(net: CVAE) -> str:
    """Hash the order and shapes of the parameters: the words themselves have no boundaries."""
    text = json.dumps([[name, list(tensor.shape)] for name, tensor in net.state_dict().items()])
    return hashlib.sha256(text.encode()).hexdigest()


def parameters_to_words(state: Mapping[str, torch.Tensor]) -> bytes:
    """Write a network's tensors of any shapes, in order; raise `GeneratorError` if one is not finite."""
    writer = IntegerWriter()
    weights: list[Integers] = []
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise diverged()
        rows = _rows(tensor).detach().cpu().double().numpy()
        if name in TABLES:
            _write_table(writer, clip(np.rint(rows * OCTAVE)))
        elif name.startswith(WEIGHTS):
            # Each row is written as its difference from the most similar earlier row, or zeros.
            for row in clip(np.rint(rows * _WEIGHT_GRID)):
                rests = [row - earlier for earlier in _references(weights, len(rows), len(row))]
                # A table's own median is stored with it, so a constant difference costs next to nothing.
                sizes = [float(np.abs(rest - np.median(rest)).sum()) for rest in rests]
                best = sizes.index(min(sizes))
                write_side(writer, np.array([best], dtype=np.int32))
                _write_table(writer, rests[best][None])
                weights.append(row)
        else:
            power = np.square(rows).mean(axis=1)  # (rows,)
            used = power > 2.0**-200  # smaller rows are stored as zeros: their exponents would be out of range
            level = np.rint(OCTAVE * np.log2(np.where(used, power, 1.0)) / 2).astype(np.int32) - _RESOLUTION
            exponents = np.where(used, level, _ZERO).astype(np.int32)
            write_side(writer, exponents)
            integers = clip(np.rint(rows[used] / np.exp2(exponents[used] / OCTAVE)[:, None]))
            writer.write(integers.ravel(), np.full(integers.size, _RESOLUTION, dtype=np.int32))
    return writer.to_bytes()


def words_to_parameters(words: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Read the output of `parameters_to_words`, float32 of these shapes; raise `CodeError` if it is damaged."""
    reader = IntegerReader(words)
    weights: list[Integers] = []
    state = {}
    for name, shape in shapes.items():
        rows, columns = _rows(torch.empty(shape, device="meta")).shape
        if name in TABLES:
            values = _read_table(reader, rows, columns) / OCTAVE
        elif name.startswith(WEIGHTS):
            for _ in range(rows):
                references = _references(weights, rows, columns)
                best = int(read_side(reader, 1)[0])
                if not 0 <= best < len(references):
                    raise CodeError("a row of weights refers to a row that does not exist")
                weights.append(_read_table(reader, 1, columns)[0] + references[best])
            values = np.stack(weights[-rows:]) / _WEIGHT_GRID
        else:
            exponents = read_side(reader, rows)  # (rows,)
            used = exponents != _ZERO
            if (np.abs(exponents[used]) > -_ZERO).any():
                raise CodeError("a step is out of range")
            integers = reader.read(np.full(int(used.sum()) * columns, _RESOLUTION, dtype=np.int32))
            values = np.zeros((rows, columns))
            values[used] = integers.reshape(-1, columns) * np.exp2(exponents[used] / OCTAVE)[:, None]
        state[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
    return state


def diverged() -> GeneratorError:
    """Return the error for values that are not finite."""
    return GeneratorError("training has diverged", hint="train again with a lower learning rate")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Flatten all axes but the last."""
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)


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


def _references(known: Sequence[Integers], layers: int, columns: int) -> list[Integers]:
    """Return the rows that a row may be stored as a difference from."""
    # These are zeros, the previous row, and the rows of the same layer in earlier tensors, where the sizes agree.
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
    """Write one number per row or tensor, shape (n,), each as its difference from the previous one."""
    writer.write(np.diff(values, prepend=0).astype(np.int32), np.full(len(values), _SIDE, dtype=np.int32))


def read_side(reader: IntegerReader, count: int) -> Integers:
    """Read the output of `write_side`, shape (count,)."""
    values: Integers = np.cumsum(reader.read(np.full(count, _SIDE, dtype=np.int32))).astype(np.int32)
    return values
